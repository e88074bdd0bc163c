"""What every signal promises."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch

from prunekit.calibration.statistics import statistics_of
from prunekit.layer.problem import LayerProblem
from prunekit.plugins.signal import Signal
from prunekit.testing.layers import LAYERS, Quirk, other_order, permuted, tensors_of, toy_layer
from prunekit.testing.shapes import on_any_shape


def measured(signal: Signal, layer: LayerProblem) -> float:
    """Measure what calibration tells this signal, and check what holds for every number."""
    value = signal.measure(layer.restricted_to(signal.needs))
    assert type(value) is float
    assert math.isfinite(value)
    return value


class SignalSuite:
    """Subclass it, name it Test..., and set `plugin`."""

    plugin: Signal

    @pytest.fixture(params=[(12, 1), (6, 4)], ids=["columns", "blocks"])
    def plain(self, request: pytest.FixtureRequest) -> LayerProblem:
        return toy_layer(*request.param, needs=self.plugin.needs)

    def test_is_a_frozen_dataclass_that_needs_known_fields(self) -> None:
        assert dataclasses.is_dataclass(self.plugin)
        assert hash(self.plugin) == hash(replace(self.plugin))  # type: ignore[type-var]
        statistics_of(self.plugin.needs)  # refuses what there is not

    def test_gives_the_same_finite_number_twice_and_leaves_its_input_alone(self, subtests: pytest.Subtests) -> None:
        for name, made in LAYERS.items():
            with subtests.test(name):
                layer, state = made(needs=self.plugin.needs), torch.get_rng_state()
                before = [tensor.clone() for tensor in tensors_of(layer)]
                assert measured(self.plugin, layer) == measured(self.plugin, replace(layer))
                assert torch.equal(state, torch.get_rng_state()), "the global random state is the caller's"
                assert all(torch.equal(one, two) for one, two in zip(before, tensors_of(layer), strict=True))

    def test_does_not_depend_on_the_order_of_the_groups(self, plain: LayerProblem) -> None:
        here, there = (measured(self.plugin, layer) for layer in (plain, permuted(plain, other_order(plain))))
        assert there == pytest.approx(here, rel=1e-5, abs=1e-7)

    @pytest.mark.parametrize("scale", [2.0**-6, 2.0**6])
    def test_is_the_same_in_other_units_if_it_says_so(self, plain: LayerProblem, scale: float) -> None:
        if not self.plugin.unitless:
            pytest.skip("it does not say so")
        producers = tuple(replace(producer, weight=scale * producer.weight) for producer in plain.producers)
        louder = replace(plain, weight=scale * plain.weight, producers=producers)
        assert measured(self.plugin, louder) == pytest.approx(measured(self.plugin, plain), rel=1e-5, abs=1e-7)

    @on_any_shape
    def test_is_finite_on_any_shape(
        self, *, n_groups: int, group_size: int, d_out: int, quirk: Quirk, seed: int, damping: float
    ) -> None:
        layer = toy_layer(n_groups, group_size, d_out, quirk=quirk, seed=seed, needs=self.plugin.needs)
        measured(self.plugin, replace(layer, damping=damping))
