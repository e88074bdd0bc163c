from dataclasses import replace

import pytest
import torch

from prunekit.testing import toy_layer
from prunekit_strategies.signals.stiffness import Stiffness


@pytest.fixture(params=[1, 3], ids=["columns", "blocks"])
def layer(request):
    return replace(toy_layer(5, request.param, 7, dtype=torch.float64, moments=torch.float64), damping=1e-6)


def test_the_diagonal_is_the_relative_error_of_losing_one_group(layer):
    alone = [layer.error(layer.masked([h for h in range(5) if h != g]).weight) for g in range(5)]
    assert Stiffness(diagonal=True).measure(layer) == pytest.approx(25 / sum(1 / e for e in alone), rel=1e-4)


def test_no_relaxed_mask_that_removes_a_fifth_is_cheaper(layer):
    def cost(mask):
        gone = mask.repeat_interleave(layer.group_size)
        return layer.error(layer.weight * (1 - gone))

    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(500, 5, generator=generator, dtype=torch.float64) * 0.3
    masks += (1 - masks.sum(1, keepdim=True)) / 5  # one group in all
    assert Stiffness().measure(layer) / 25 <= min(cost(mask) for mask in masks) * (1 + 1e-4)


def test_uncorrelated_outputs_need_no_inverse():
    layer = replace(toy_layer(4, 1, 4), weight=torch.eye(4), gram=torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    expected = 16 / sum(10 / h for h in (1, 2, 3, 4))
    layer = replace(layer, damping=0.0)
    assert Stiffness().measure(layer) == pytest.approx(expected, rel=1e-4)
    assert Stiffness().measure(layer) == pytest.approx(Stiffness(diagonal=True).measure(layer))


def test_it_lies_between_nothing_and_all(layer):
    assert 0 < Stiffness().measure(layer) <= 1 + 1e-5


def test_what_puts_nothing_out_has_none():
    assert Stiffness().measure(toy_layer(quirk="silent")) == 0
