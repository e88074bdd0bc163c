"""Every part keeps the promises of its kind; what is its own is tested by hand."""

import math

import pytest
import torch

import prunekit as pk
from prunekit import MapShape, Received, Total
from prunekit.calibration.twin import Twin
from prunekit.testing import (
    AllocatorSuite,
    ExporterSuite,
    FinisherSuite,
    LearnerSuite,
    MetricSuite,
    ObjectiveSuite,
    PrunerSuite,
    SignalSuite,
    StatisticSuite,
    toy_layer,
    toy_workpiece,
)
from prunekit.testing.spaces import sites_of
from prunekit_corner import (
    Descent,
    Kurtosis,
    LeaveOneOut,
    Loudest,
    OneLook,
    Table,
    Tails,
    Volume,
    WeightedParameters,
    WorstSite,
)


class TestLeaveOneOut(PrunerSuite):
    plugin = LeaveOneOut()


class TestLeaveOneOutWithoutRefit(PrunerSuite):
    plugin = LeaveOneOut(refit=False)


class TestLoudest(SignalSuite):
    plugin = Loudest()


class TestKurtosis(StatisticSuite):
    plugin = Kurtosis()


class TestTails(SignalSuite):
    plugin = Tails()


class TestDescent(AllocatorSuite):
    plugin = Descent()


class TestOneLook(LearnerSuite):
    plugin = OneLook()
    flat_slack = math.inf  # what has no slope at 1 has no effect to first order
    pairs_slack = 1.0


class TestWorstSite(ObjectiveSuite):
    plugin = WorstSite()


class TestVolume(FinisherSuite):
    plugin = Volume()


def test_the_kurtosis_of_a_normal_distribution_is_three() -> None:
    inputs = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    sums = Kurtosis().start(MapShape(2, 1), torch.device("cpu"))
    Kurtosis().add(sums, Received(lambda: inputs))
    value = Kurtosis().finish(sums, Total(len(inputs), torch.ones(1, 2), inputs.square().mean(0)))
    assert value.tolist() == pytest.approx([3, 3], abs=0.1)


class TestWeightedParameters(MetricSuite):
    plugin = WeightedParameters()


class TestTable(ExporterSuite):
    plugin = Table()


def test_attention_is_dearer_than_as_many_parameters_of_the_mlp() -> None:
    attention, mlp = sites_of(1, attention=(4, 10), mlp=(4, 10))
    budget = pk.Budget.keeping(0.5, [attention, mlp], metric=WeightedParameters(attention=3))
    assert budget.limit == 80  # of 120 and 40
    assert (budget.price(attention, 2), budget.price(mlp, 2)) == (60, 20)


def test_outputs_are_as_loud_as_the_dense_ones() -> None:
    piece = toy_workpiece()
    Volume().finish(piece)
    for here in Twin(piece, piece.tokens):
        powers = [float(y.square().sum()) for y in (here.made(0), here.wanted(0, "dense"))]
        assert powers[0] == pytest.approx(powers[1])


def test_the_cost_is_the_error_of_losing_one_group() -> None:
    layer = toy_layer(6, 4)
    alone = [layer.error(layer.masked([g for g in range(6) if g != gone]).weight) for gone in range(6)]
    cheapest = min(range(6), key=alone.__getitem__)
    expected = layer.masked([g for g in range(6) if g != cheapest])
    (candidate,) = LeaveOneOut(refit=False).prune(layer, [5])
    assert candidate.kept == expected.kept
    assert torch.equal(candidate.weight, expected.weight)
