"""Every part keeps the promises of its kind; what is its own is tested by hand."""

import torch

from prunekit.testing import AllocatorSuite, ObjectiveSuite, PrunerSuite, SignalSuite, toy_layer
from prunekit_corner import Descent, LeaveOneOut, Loudest, WorstSite


class TestLeaveOneOut(PrunerSuite):
    plugin = LeaveOneOut()


class TestLeaveOneOutWithoutRefit(PrunerSuite):
    plugin = LeaveOneOut(refit=False)


class TestLoudest(SignalSuite):
    plugin = Loudest()


class TestDescent(AllocatorSuite):
    plugin = Descent()


class TestWorstSite(ObjectiveSuite):
    plugin = WorstSite()


def test_the_cost_is_the_error_of_losing_one_group() -> None:
    layer = toy_layer(6, 4)
    alone = [layer.error(layer.masked([g for g in range(6) if g != gone]).weight) for gone in range(6)]
    cheapest = min(range(6), key=alone.__getitem__)
    expected = layer.masked([g for g in range(6) if g != cheapest])
    (candidate,) = LeaveOneOut(refit=False).prune(layer, [5])
    assert candidate.kept == expected.kept
    assert torch.equal(candidate.weight, expected.weight)
