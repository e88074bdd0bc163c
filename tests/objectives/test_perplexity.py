"""The perplexity objective agrees with the model that is assembled."""

import math

import pytest
import torch

from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.perplexity import Perplexity


def test_the_loss_is_the_perplexity_of_the_assembled_model():
    net, batch = toy_supernet(), toy_tokens()
    plan = net.space.uniform()
    small = net.assemble(plan)
    logits = small(batch.ids).logits[:, :-1].flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:].flatten())
    assert Perplexity().loss(net, plan, batch) == pytest.approx(math.exp(nll), rel=1e-6)
