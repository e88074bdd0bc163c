"""What every statistic promises, and one of a third party's kind."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from prunekit.errors import PluginError
from prunekit.layer.statistics import MapShape, Part, Received, Statistic, Sums, Total

WINDOWS, LENGTH = 5, 8


@dataclass(frozen=True)
class Peak(Statistic):
    """The largest |x̂_j|: sums that do not add up."""

    name: ClassVar[str] = "peak"

    def add(self, sums: Sums, received: Received) -> None:
        sums["sum"] = torch.maximum(sums["sum"], received.inputs.abs().amax(0))

    def merge(self, one: Sums, other: Sums) -> Sums:
        return {"sum": torch.maximum(one["sum"], other["sum"])}

    def finish(self, sums: Sums, total: Total) -> Tensor:
        return sums["sum"]


class StatisticSuite:
    """Subclass it, name it Test..., and set `plugin`."""

    plugin: Statistic

    @pytest.fixture(params=[(6, 4, False), (3, 7, False), (6, 4, True)], ids=["wide", "tall", "shared"])
    def shape(self, request: pytest.FixtureRequest) -> MapShape:
        return MapShape(*request.param)

    def test_is_a_frozen_dataclass_that_travels(self) -> None:
        copy = pickle.loads(pickle.dumps(self.plugin))
        assert copy == self.plugin
        assert hash(copy) == hash(self.plugin)

    def test_shards_give_the_value_of_the_whole(self, shape: MapShape) -> None:
        whole, shards = self._of(shape, slice(None)), [self._of(shape, part) for part in (slice(2), slice(2, None))]
        before = [{name: value.clone() for name, value in sums.items()} for sums in shards]
        merged = self.plugin.merge(*shards)
        assert all(torch.equal(one[k], other[k]) for one, other in zip(shards, before, strict=True) for k in one)
        torch.testing.assert_close(self._value(shape, merged), self._value(shape, whole), rtol=1e-9, atol=1e-12)

    def test_the_value_is_one_finite_number_or_of_every_input(self, shape: MapShape) -> None:
        sums = self._of(shape, slice(None))
        value = self._value(shape, sums)
        assert value.shape == () or value.shape[-1] == shape.d_in
        assert bool(torch.isfinite(value).all())
        assert torch.equal(value, self._value(shape, sums)), "to ask changes nothing"

    def test_takes_what_it_says(self, shape: MapShape) -> None:
        sums = self._of(shape, slice(None))
        assert all(isinstance(value, Tensor) for value in sums.values())
        assert self.plugin.bytes(shape) == sum(value.nbytes for value in sums.values())
        assert self.plugin.flops(shape, 10) > 0
        assert self.plugin.flops(shape, 20) == 2 * self.plugin.flops(shape, 10)

    def test_looks_at_nothing_but_what_it_says(self, shape: MapShape) -> None:
        self._of(shape, slice(None), self.plugin.sees)
        sums = self.plugin.start(shape, torch.device("cpu"))
        for part in self.plugin.sees - {"producers", "output"}:
            with pytest.raises(PluginError, match=f"asked for '{part}'.*has to say so in what it `sees`"):
                self.plugin.add(sums, toy_received(shape, slice(None), self.plugin.sees - {part}))

    @torch.no_grad()
    def _of(self, shape: MapShape, windows: slice, sees: frozenset[Part] | None = None) -> Sums:
        sums = self.plugin.start(shape, torch.device("cpu"))
        every = frozenset[Part]({"output", "residual", "entered", "dense"})
        for window in range(WINDOWS)[windows]:  # each a batch
            one = slice(window, window + 1)
            self.plugin.add(sums, toy_received(shape, one, every if sees is None else sees))
        return sums

    def _value(self, shape: MapShape, sums: Sums) -> Tensor:
        x = toy_tokens_of(shape)[0].flatten(0, 1)
        weight = toy_map(shape).weight.detach()
        return self.plugin.finish(sums, Total(len(x), weight, x.square().mean(0)))


def toy_map(shape: MapShape) -> torch.nn.Linear:
    """A linear map with a bias, in float64."""
    linear = torch.nn.Linear(shape.d_in, shape.d_out, dtype=torch.float64)
    for values in linear.parameters():
        values.requires_grad_(False).copy_(_drawn(*values.shape, seed=len(values)))
    return linear


def toy_tokens_of(shape: MapShape) -> tuple[Tensor, Tensor]:
    """What reaches a map in a pruned model and in the dense one, (windows, length, d_in)."""
    dense = _drawn(WINDOWS, LENGTH, shape.d_in, seed=1)
    return dense + 0.3 * _drawn(WINDOWS, LENGTH, shape.d_in, seed=2), dense


def toy_received(shape: MapShape, windows: slice, sees: frozenset[Part]) -> Received:
    """Some windows of it, with no more to be seen than is said."""
    carried, dense = (x[windows] for x in toy_tokens_of(shape))
    residuals = [_drawn(WINDOWS, LENGTH, shape.d_out, seed=seed)[windows] for seed in (3, 4)]
    linear: Any = toy_map(shape) if "output" in sees or "dense" in sees else None

    def at(x: Tensor, residual: Tensor, beside: Received | None) -> Received:
        stream: Callable[[], Tensor] | None = (lambda: residual) if "residual" in sees else None
        entered: Callable[[], Tensor] | None = (lambda: 0.7 * residual + 0.1) if "entered" in sees else None
        made = linear if beside is None or "output" in sees else None
        return Received(lambda: x, made, LENGTH, stream, beside, entered=entered)

    return at(carried, residuals[0], at(dense, residuals[1], None) if "dense" in sees else None)


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
