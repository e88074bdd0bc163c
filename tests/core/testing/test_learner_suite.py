"""The suite of learners holds those that look once to what they were told, and no longer to what they could not see."""

from dataclasses import dataclass

import pytest
import torch

from prunekit import Effort, GateQuery, Learner
from prunekit.testing import LearnerSuite


@dataclass(frozen=True)
class OneLook(Learner):
    """Decide by the slopes at one setting of all gates, in the way of the fault, if it has one."""

    fault: str = ""
    gate: float = 1.0

    def learn(self, problem):
        (windows,) = problem.batches(1, 4096)
        gates = torch.full((problem.groups,), self.gate, dtype=torch.float64)
        reply = yield GateQuery(gates, windows, frozenset({"gradient"}))
        value = {"": -reply.gradient, "least": 1 + reply.gradient, "deaf": problem.even()}[self.fault]
        return [problem.decision(problem.project(value.clamp_min(0)))]

    def effort(self, windows, seqlen, budgets=1):
        return Effort(1, back=seqlen * max(1, min(windows, 4096 // seqlen)))


class TestOneLook(LearnerSuite):
    plugin = OneLook()


class TestOneLookAside(LearnerSuite):
    plugin = OneLook(gate=0.5)  # where a loss that is flat at 1 has a slope


PROMISES = {
    "linear": lambda suite: suite.test_finds_the_knapsack_of_a_separable_loss(1),
    "flat": lambda suite: suite.test_finds_the_knapsack_of_a_separable_loss(2),
    "pairs": lambda suite: suite.test_finds_a_good_mask_of_groups_that_interact(),
}


def suite_of(plugin):
    suite = LearnerSuite()
    suite.plugin = plugin
    return suite


@pytest.mark.parametrize(("fault", "gate", "promise"), [
    ("least", 1.0, "linear"), ("deaf", 1.0, "linear"), ("least", 1.0, "pairs"), ("least", 0.5, "flat"),
])  # fmt: skip
def test_one_that_does_not_heed_what_it_was_told_fails(fault, gate, promise):
    with pytest.raises(AssertionError):
        PROMISES[promise](suite_of(OneLook(fault, gate)))


def test_one_that_looks_again_is_held_to_the_bars_of_all():
    @dataclass(frozen=True)
    class TwoLooks(OneLook):
        def learn(self, problem):
            (windows,) = problem.batches(1, 4096)
            yield GateQuery(torch.zeros(problem.groups, dtype=torch.float64), windows)
            return (yield from super().learn(problem))

    with pytest.raises(AssertionError):
        PROMISES["flat"](suite_of(TwoLooks()))
