"""How long a pruner works, and how fast blocks run and statistics are added up, measured on what stands in for those of
the model."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.fill import PRICED_AT_ONCE
from prunekit.calibration.moments import Moments, collected
from prunekit.calibration.statistics import statistics_of
from prunekit.layer.problem import LayerProblem, Producer
from prunekit.layer.statistics import MapShape, Need, Received, Statistic, named
from prunekit.models.blocks import TOKENS_AT_ONCE, entered
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.pruner import LocalPruner
from prunekit.space.sites import Site
from prunekit.system.rates import wait_for

FIRST = 512  # columns of the first stand-in
ENOUGH = 0.3  # seconds: what takes as long is not tried on a wider layer
WINDOW = 8  # tokens of a stand-in's windows
RUNS = 3  # of a block and of statistics, of which the fastest counts
WIDEST = 2048  # inputs and outputs of a map whose statistics are tried

Fed = Sequence[tuple[int, int]]
"""(rows that go with a group, columns) of every producer layer."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trials:
    """What a pruner and its statistics take, as far as they were tried; every question is answered once."""

    pruner: LocalPruner
    needs: frozenset[Need]
    damping: float
    device: torch.device
    stored: torch.dtype  # of weights
    known: dict[Any, float | None] = field(default_factory=dict)  # seconds of the pruner
    paces: dict[Any, float | None] = field(default_factory=dict)  # FLOP/s of statistics

    def seconds(
        self, site: Site, producers: Mapping[str, MapShape], ladder: Sequence[int], made: Sequence[int] | None
    ) -> float | None:
        """What the pruner takes for one layer.

        Args:
            site: of the layer.
            producers: the linear maps whose rows go with its groups.
            ladder: counts it is asked for.
            made: those of them that candidates are made of, where the others are only priced; None: all.

        Returns:
            Seconds; of wide layers carried on from narrower ones of the same form, as work that grows with the third
            power of the width. None: it did not work on the stand-in.
        """
        counts, few = (tuple(kept / site.n_groups for kept in some) for some in (ladder, made or ()))
        fed = tuple(sorted((shape.d_out // site.n_groups, shape.d_in) for shape in producers.values()))
        key = (site.d_in, site.d_out, site.group_size, site.form, fed, counts, few)
        if key not in self.known:
            try:
                with torch.random.fork_rng(devices=()):  # a run is the same whether it was planned or not
                    self.known[key] = self._tried(site, fed, counts, few)
            except Exception as error:  # a plug-in may refuse a layer that is made up
                _log.info("%s was not tried on %s: %s", type(self.pruner).__name__, site.name, error)
                self.known[key] = None
        return self.known[key]

    def adding(
        self, statistics: tuple[Statistic, ...], own: MapShape, fed: Mapping[str, MapShape], computed: torch.dtype
    ) -> float | None:
        """FLOP/s at which the statistics of a map are added up: of its own shape, or of a narrower one's.

        Thin products, sums in float64 and what is made wide for them are slower than the products of a model.

        Args:
            statistics: that are collected there.
            own: of the map.
            fed: the linear maps whose rows go with its groups, by name.
            computed: dtype of what the map receives.

        Returns:
            None: they could not be tried, or nothing is counted of them.
        """
        key = (statistics, own, tuple(fed.values()), computed)
        if key not in self.paces:
            try:
                with torch.random.fork_rng(devices=()):
                    self.paces[key] = self._added(statistics, own, fed, computed)
            except Exception as error:  # a plug-in's own statistics may refuse what is made up
                _log.info("the statistics of a map of %d inputs were not tried: %s", own.d_in, error)
                self.paces[key] = None
        return self.paces[key]

    @torch.no_grad()
    def _added(
        self, statistics: tuple[Statistic, ...], own: MapShape, fed: Mapping[str, MapShape], computed: torch.dtype
    ) -> float | None:
        def narrow(shape: MapShape) -> MapShape:
            return replace(shape, d_in=min(shape.d_in, WIDEST), d_out=min(shape.d_out, WIDEST))

        shape, producers = narrow(own), {path: narrow(each) for path, each in fed.items()}
        tokens = TOKENS_AT_ONCE // WINDOW * WINDOW
        moments = Moments.empty(statistics, shape, self.device, producers)

        generator = torch.Generator().manual_seed(0)

        def drawn(width: int, rows: int = tokens) -> Tensor:
            return torch.randn(rows, width, generator=generator).to(self.device, computed)

        x, before, stream, other, entered = map(drawn, (shape.d_in, shape.d_in, *(shape.d_out,) * 3))
        inputs = {path: drawn(each.d_in) for path, each in producers.items()}
        linear = nn.Linear(shape.d_in, shape.d_out, bias=False, device="meta")
        linear.weight = nn.Parameter(drawn(shape.d_in, shape.d_out), requires_grad=False)
        took = []
        for _ in range(1 + RUNS):  # the first time pays for what later ones find ready
            dense = Received(lambda: before, linear, WINDOW, lambda: other)
            _ = dense.made  # the passes of the dense model make it
            wait_for(self.device)
            started = time.perf_counter()
            moments.add(Received(lambda: x, linear, WINDOW, lambda: stream, dense, entered=lambda: entered))
            for path, values in inputs.items():
                moments.add_producer(path, Received(lambda values=values: values, length=WINDOW))
            wait_for(self.device)
            took.append(time.perf_counter() - started)
        return Moments.flops(statistics, shape, producers, tokens) / min(took[1:]) or None

    def _tried(self, site: Site, fed: Fed, ladder: Sequence[float], made: Sequence[float]) -> float:
        part, columns = math.lcm(site.group_size, site.form.m or 1, site.form.parts), min(FIRST, site.d_in)
        while True:
            width = site.d_in if columns == site.d_in else max(1, columns // part) * part
            layer, step = self._stand_in(site, width, fed), site.form.step(width)

            def counts(shares: Sequence[float], layer: LayerProblem = layer, step: int = step) -> list[int]:
                least = site.form.least(layer.d_in)
                return sorted({max(least, round(x * layer.most / step) * step) for x in shares})

            started = time.perf_counter()
            times = self._work(layer, counts(ladder), counts(made))
            took = times * (time.perf_counter() - started)
            if took >= ENOUGH or width == site.d_in:
                return took * (site.d_in / width) ** 3
            columns = min(2 * columns, site.d_in)

    def _work(self, layer: LayerProblem, ladder: Sequence[int], made: Sequence[int]) -> int:
        """Ask for some counts, and say how many times as often all are asked for."""
        nested, times = self.pruner.nested(layer) if made else None, 1
        if nested is not None:
            _ = nested.losses, nested.candidates(made)
        else:
            some, times = (ladder[:PRICED_AT_ONCE], -(-len(ladder) // PRICED_AT_ONCE)) if made else (ladder, 1)
            self.pruner.prune(layer, some)
        wait_for(self.device)
        return times

    @torch.no_grad()
    def _stand_in(self, site: Site, width: int, fed: Fed) -> LayerProblem:
        """A layer of so many columns in the proportions of a site's, with all that the pruner needs."""
        generator, place, share = torch.Generator().manual_seed(0), self.device, width / site.d_in

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(place)

        def less(count: int) -> int:
            return max(1, round(share * count))

        needs, d_out = named(self.needs), less(site.d_out)
        n_groups = site.form.most(width // site.group_size, width, d_out)
        tokens = WINDOW * (2 * width // WINDOW + 1)
        x = (normal(tokens, width) + normal(tokens, 1)) * normal(width).exp()  # correlated, of very different size
        linear = nn.Linear(width, d_out, bias=False, device="meta")
        linear.weight = nn.Parameter(normal(d_out, width) / width**0.5, requires_grad=False)
        weights = {str(i): normal(n_groups * rows, less(columns)) for i, (rows, columns) in enumerate(fed)}
        maps = {path: MapShape(weight.shape[1], len(weight)) for path, weight in weights.items()}
        moments = Moments.empty(
            collected(statistics_of(self.needs), residual=True), MapShape(width, d_out), place, maps
        )
        stream = normal(tokens, d_out)
        dense = Received(lambda: 1.1 * x, linear, WINDOW, lambda: 1.1 * stream)
        moments.add(Received(lambda: x, linear, WINDOW, lambda: stream, dense))
        for path, shape in maps.items():
            moments.add_producer(path, Received(lambda shape=shape: normal(tokens, shape.d_in), length=WINDOW))

        def learnt(weight: Tensor) -> dict[str, Tensor]:
            if "gradient" not in needs:
                return {}
            return {"gradient": normal(*weight.shape), "fisher": normal(*weight.shape).square()}

        values = moments.values(linear.weight)
        cross, drift, energy = (values.pop(name, None) for name in ("cross", "drift", "energy"))
        if "contrast" in needs:
            values["contrast"] = moments.power
        if "output-fisher" in needs:
            values["output-fisher"] = stream.T @ stream / tokens
        return LayerProblem(
            linear.weight.to(self.stored), moments.gram, site.group_size, site.form, self.damping,
            cross, drift, None if energy is None else float(energy), values | learnt(linear.weight),
            tuple(
                Producer(path, weight.to(self.stored), moments.values(weight, path) | learnt(weight))
                for path, weight in weights.items()
            ),
            name="a layer to try",
        )  # fmt: skip


@torch.no_grad()
def forward_seconds(
    model: nn.Module, adapter: ModelAdapter, seqlen: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, int] | None:
    """Seconds that one block takes for a chunk of tokens, and how many they are, so that a plan knows a real rate.

    Products of a model's own shapes, attention and all that is added and normalised between them are slower than
    square products. It is the block in the middle; that of a skeleton gets values that mean nothing.

    Returns:
        None: it does not run so; a skeleton may hold what only a whole model can compute.
    """
    try:
        with torch.random.fork_rng(devices=()):
            return _forward_seconds(model, adapter, seqlen, device, dtype)
    except Exception as error:  # the code of a model may read values that a skeleton does not have
        _log.info("no block was timed: %s", error)
        return None


def _forward_seconds(
    model: nn.Module, adapter: ModelAdapter, seqlen: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, int]:
    windows, skeleton = max(1, TOKENS_AT_ONCE // seqlen), next(model.parameters()).is_meta
    if skeleton:
        model = _with_values_in_front(copy.deepcopy(model), adapter, device, dtype)
    first = next(model.parameters()).device
    hidden, calls = entered(model, adapter, torch.zeros(windows, seqlen, dtype=torch.long, device=first))
    middle = len(calls) // 2
    block, call = adapter.blocks(model)[middle], calls[middle]
    if skeleton:
        _fill(block.to_empty(device=device).to(dtype))
    hidden.normal_()
    call(block, hidden)  # the first time pays for what later ones find ready
    took = []
    for _ in range(RUNS):
        wait_for(device)
        started = time.perf_counter()
        call(block, hidden)
        wait_for(device)
        took.append(time.perf_counter() - started)
    return min(took), windows * seqlen


def _with_values_in_front(model: Any, adapter: ModelAdapter, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A skeleton that can be run as far as its first block, with a vocabulary of one word."""
    width = model.get_input_embeddings().weight.shape[1]
    model.set_input_embeddings(nn.Embedding(1, width, device="meta"))
    behind = {
        id(module) for part in (adapter.blocks(model), model.get_output_embeddings()) for module in part.modules()
    }
    for module in model.modules():
        if id(module) not in behind:
            _fill(module.to_empty(device=device, recurse=False), recurse=False)
    return model.to(dtype)


def _fill(module: nn.Module, *, recurse: bool = True) -> None:
    """With values that mean nothing, of the size of weights."""
    for values in (*module.parameters(recurse), *module.buffers(recurse)):
        _ = values.normal_(std=0.02) if values.is_floating_point() else values.fill_(0)
