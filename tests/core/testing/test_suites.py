"""The suites themselves: they pass what keeps its promises and fail what does not."""

from dataclasses import dataclass

import pytest
import torch

from prunekit import Finisher, PluginError
from prunekit.plugins.registry import ADAPTERS
from prunekit.testing import AdapterSuite, FinisherSuite, KeepLargest, PrunerSuite


@pytest.mark.parametrize("name", list(ADAPTERS))
class TestEveryAdapter(AdapterSuite):
    @pytest.fixture(autouse=True)
    def _plugin(self, name):
        type(self).plugin = ADAPTERS.build(name)


class TestKeepLargest(PrunerSuite):
    plugin = KeepLargest()


@dataclass(frozen=True)
class Scale(Finisher):
    """Halve every norm."""

    def finish(self, piece):
        with torch.no_grad():
            for name, parameter in piece.model.named_parameters():
                if "norm" in name:
                    parameter.mul_(0.5)
        return {}


class TestScale(FinisherSuite):
    plugin = Scale()


@dataclass(frozen=True)
class Break(Finisher):
    """Leave something that is not a number, another shape, or a bias nobody was told of."""

    how: str

    def finish(self, piece):
        linear = piece.adapter.linear(piece.adapter.blocks(piece.model)[0], piece.sites[0])
        if self.how == "nan":
            linear.weight.data.fill_(torch.nan)
        elif self.how == "shape":
            linear.weight = torch.nn.Parameter(linear.weight[:, :4].detach(), requires_grad=False)
        else:
            linear.bias = torch.nn.Parameter(torch.zeros(24), requires_grad=False)
        return {}


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("nan", r"left values in model\.layers\.0\.self_attn\.o_proj\.weight that are not finite"),
        ("shape", r"changed .*o_proj\.weight from \(24, 16\) to \(24, 4\); every shape must stay"),
        ("bias", r"changed .*o_proj\.bias from nothing to \(24,\)"),
    ],
)
def test_a_finisher_that_breaks_the_model_fails(how, sentence):
    suite = FinisherSuite()
    type(suite).plugin = Break(how)
    with pytest.raises(PluginError, match=sentence):
        suite.test_the_same_work_has_the_same_result()


@dataclass(frozen=True)
class Meddle(Finisher):
    """Change the dense model."""

    def finish(self, piece):
        next(piece.dense.parameters()).data += 1
        return {}


def test_a_finisher_that_changes_the_dense_model_fails():
    suite = FinisherSuite()
    type(suite).plugin = Meddle()
    with pytest.raises(AssertionError):
        suite.test_all_it_needs_is_in_the_piece_and_the_rest_is_left_alone()
