"""The promises of every signal, and the claim of this one."""

from dataclasses import replace

import pytest
import torch

from prunekit.templates.signal import Template
from prunekit.testing import SignalSuite, toy_layer


class TestTemplate(SignalSuite):
    plugin = Template()


def test_it_is_one_where_all_groups_receive_the_same() -> None:
    layer = toy_layer(n_groups=6, group_size=4)
    even = replace(layer, gram=torch.eye(24, dtype=layer.gram.dtype))
    assert Template().measure(even) == pytest.approx(1)
    assert 1 / 6 <= Template().measure(layer) < 1
