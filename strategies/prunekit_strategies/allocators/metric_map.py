"""One measured number per site or block, mapped to what it keeps; the papers are configurations of one map."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from prunekit import Allocator, Problem, Query, Search, Signal, Space, check_choices
from prunekit_strategies.allocators.competing import best_of
from prunekit_strategies.signals.influence import Influence
from prunekit_strategies.signals.outliers import Outliers
from prunekit_strategies.signals.tail_exponent import TailExponent

Per = Literal["block", "kind", "site"]
Keep = Literal["high", "low"]
Scale = Literal["range", "rank", "sigmoid"]
Combine = Literal["shift", "scale"]
SPREADS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)
RUNGS = 8  # on either side of the centre, a spread away at most


@dataclass(frozen=True)
class MetricMap(Allocator):
    """Remove more where a number measured at every site is low (or high), by a map with one free parameter.

        v_i   the signal at site i, or its mean over the sites of a block weighted by their parameters          (1)
        x_i   in 0..1:  range (v_i - min v)/(max v - min v);  rank: place of v_i over (number of places - 1);
              sigmoid 1/(1 + exp(-z_i)) of the z-score;  1 - x_i where the low ones shall keep more             (2)
        shift r_i = r̄ + spread (x̄ - x_i)                                                                        (3)
        scale r_i = r̄ f_i / f̄,   f_i = 1 + spread (½ - x_i)                                                     (4)

    with r_i the share that site i loses and r̄ what the budget asks; means are weighted by price. Shares beyond 0..1
    are cut off and all sites move by a common share until the budget is spent exactly. Equal numbers are uniform.

    With `spread: null` the objective chooses among SPREADS. With `compete` the start is among the answers it chooses
    from, so that the result is never worse than uniform on the objective, and the journal says who won; without, the
    map has the last word.

    Sources: the subclasses. Ours: prices as weights (papers take the plain mean over blocks, which is wrong for
    unequal ones), the exact budget, and every combination of signal, comparison and map.
    """

    signal: Signal | None = field(default_factory=Outliers)  # None: the error table at the mean share, no signal
    per: Per = "block"  # what is compared: blocks; sites of each kind by themselves; all sites
    keep: Keep = "high"  # the sites that keep more: those whose number is high, or low
    scale: Scale = "range"  # how numbers become 0..1
    combine: Combine = "shift"  # (3) or (4)
    spread: float | None = 0.16  # between the extremes: of the removed share (3), of its factor (4); None: the best
    compete: bool = True  # let the start win where the objective prefers it

    def __post_init__(self) -> None:
        check_choices(self)
        if self.spread is not None and not 0 < self.spread < 2:
            raise ValueError(f"0 < spread < 2, not {self.spread}")

    @property
    def signals(self) -> tuple[Signal, ...]:
        return () if self.signal is None else (self.signal,)

    def first_space(self, whole: Space) -> Space:
        """Ladders that reach as far as the map can, in steps that can tell its values apart."""
        if self.spread is None:
            return super().first_space(whole)
        return whole.zoomed(whole.uniform(), stride=self.spread / RUNGS, reach=RUNGS)

    def search(self, problem: Problem) -> Search:
        spreads = SPREADS if self.spread is None else (self.spread,)
        answers = dict.fromkeys(problem.space.nearest(self.wish(problem, spread)) for spread in spreads)
        if self.compete:
            answers = {problem.start: None} | answers
        losses = yield [Query(a) for a in answers]
        return best_of(type(self).__name__, problem, list(answers), losses)

    def wish(self, problem: Problem, spread: float) -> list[float]:
        """Kept groups per site, before rounding."""
        space, x = problem.space, self.standing(problem)
        wish = [float(site.n_groups) for site in space.sites]  # a site without a price keeps all
        for members, limit in space.open_partitions:
            price = {i: p for i in members if (p := space.budget.price(space.sites[i], space.sites[i].n_groups))}
            total = sum(price.values())
            mean = 1 - limit / max(total, 1)
            centre = sum(p * x[i] for i, p in price.items()) / max(total, 1)
            for i in price:
                if self.combine == "shift":
                    removed = mean + spread * (centre - x[i])  # (3)
                else:
                    removed = mean * (1 + spread * (0.5 - x[i])) / (1 + spread * (0.5 - centre))  # (4)
                wish[i] *= 1 - min(max(removed, 0.0), 1.0)
        return wish

    def standing(self, problem: Problem) -> list[float]:
        """x_i of (2): 1 for the sites that should keep most, 0 for those that should keep least."""
        sites = problem.space.sites
        values = mean_errors(problem) if self.signal is None else problem.signals[0]
        largest = max(map(abs, values)) or 1.0
        values = [v / largest for v in values]  # differences of huge numbers are infinite
        groups: dict[object, list[int]] = {}
        for i in (i for i, site in enumerate(sites) if not site.spared):
            site = sites[i]
            groups.setdefault({"block": site.block, "kind": site.kind, "site": None}[self.per], []).append(i)
        x = [0.0] * len(sites)
        if self.per == "block":
            means = [_mean([(values[i], sites[i].parameters(sites[i].n_groups)) for i in g]) for g in groups.values()]
            for members, place in zip(groups.values(), to_unit(means, self.scale), strict=True):
                for i in members:
                    x[i] = place
        else:
            for members in groups.values():
                for i, place in zip(members, to_unit([values[i] for i in members], self.scale), strict=True):
                    x[i] = place
        return x if self.keep == "high" else [1 - each for each in x]


@dataclass(frozen=True)
class OWL(MetricMap):
    """Blocks with more outliers keep more, λ = 0.08 either way.

    Source: OWL (Yin et al. 2024, arXiv 2310.05175): keep_b = 2λ (D_b - min D)/(max D - min D) + a constant; λ = 0.08
    and M = 5 for LLaMA. D_b is here the mean of the block's two sub-layers by parameters, not one pool.
    """


@dataclass(frozen=True)
class AlphaPruning(MetricMap):
    """Blocks with lighter spectral tails lose more, by factors 1 - ε to 1 + ε, ε = 0.2.

    Source: AlphaPruning (Lu et al. 2024, arXiv 2410.10912): ε = 0.2 with Wanda and SparseGPT, 0.3 with magnitude, at
    70 %; its factors can pass 1, here the budget is met with shares in 0..1. A block's α is here the mean of its
    two sub-layers by parameters, not of its linear maps.
    """

    signal: Signal | None = field(default_factory=TailExponent)
    keep: Keep = "low"
    combine: Combine = "scale"
    spread: float | None = 0.4  # 2ε


@dataclass(frozen=True)
class BlockInfluence(MetricMap):
    """Blocks that turn the residual stream further keep more.

    The number is that of ShortGPT (Men et al. 2024, arXiv 2403.03853), which drops whole blocks by it; the map to
    widths is ours, and so is the mean over the two sub-layers instead of one cosine over the block.
    """

    signal: Signal | None = field(default_factory=Influence)
    spread: float | None = None


@dataclass(frozen=True)
class ErrorMap(MetricMap):
    """Sub-layers that lose more of their output when all lose the same share keep more; attention and MLP apart.

    The crudest reading of the error table, the yardstick for `softmax` and for tables read rung by rung. Ours.
    """

    signal: Signal | None = None
    per: Per = "kind"
    spread: float | None = None


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    """(1)"""
    return math.fsum(v * w for v, w in weighted) / max(sum(w for _, w in weighted), 1)


def to_unit(values: Sequence[float], scale: Scale) -> list[float]:
    """(2): order kept, ½ for all where they are equal."""
    low, high = min(values), max(values)
    if not high > low:
        return [0.5] * len(values)
    if scale == "range":
        return [(v - low) / (high - low) for v in values]
    if scale == "rank":  # equal values share the mean of their places
        return [
            (sum(w < v for w in values) + sum(w <= v for w in values) - 1) / (2 * (len(values) - 1)) for v in values
        ]
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    return [0.5 * (1 + math.tanh((v - mean) / (2 * deviation))) for v in values]


def mean_errors(problem: Problem) -> list[float]:
    """Every site's error where all keep the same share, read between the rungs; by partition."""
    space = problem.space
    found = [0.0] * len(space.sites)
    for members, _ in space.partitions:
        groups = sum(space.budget.price(space.sites[i], space.sites[i].n_groups) for i in members)
        spent = sum(space.budget.price(space.sites[i], problem.start[i]) for i in members)
        for i in members:
            wanted = space.sites[i].n_groups * spent / max(groups, 1)
            ladder, errors = space.ladders[i], problem.errors[i]
            above = next((r for r, kept in enumerate(ladder) if kept >= wanted), len(ladder) - 1)
            below = max(above - 1, 0)
            gap = ladder[above] - ladder[below]
            part = min(max((wanted - ladder[below]) / gap, 0.0), 1.0) if gap else 0.0
            found[i] = errors[below] + part * (errors[above] - errors[below])
    return found
