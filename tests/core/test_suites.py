"""The suites themselves: they pass what keeps its promises and fail what does not."""

from dataclasses import dataclass

import pytest
import torch

from prunekit import Finisher
from prunekit.registry import ADAPTERS
from prunekit.testing import AdapterSuite, FinisherSuite


@pytest.mark.parametrize("name", list(ADAPTERS))
class TestEveryAdapter(AdapterSuite):
    @pytest.fixture(autouse=True)
    def _plugin(self, name):
        type(self).plugin = ADAPTERS.build(name)


@dataclass(frozen=True)
class Scale(Finisher):
    """Halve every norm."""

    def finish(self, model, plan, tokens):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.mul_(0.5)


class TestScale(FinisherSuite):
    plugin = Scale()


@dataclass(frozen=True)
class Break(Finisher):
    """Leave something that is not a number."""

    def finish(self, model, plan, tokens):
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)


def test_a_finisher_that_breaks_the_model_fails():
    suite = FinisherSuite()
    type(suite).plugin = Break()
    with pytest.raises(AssertionError):
        suite.test_the_weights_are_finite_and_the_same_every_time()
