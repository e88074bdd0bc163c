"""Allocations in closed form: what each site loses per parameter, seen as an energy, decides how much it keeps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from prunekit import Allocator, Problem, Query, Search, check_choices
from prunekit_strategies.allocators.probes import needed, told

Rule = Literal["fermi", "softmax", "threshold", "compliance", "water-filling"]
Energy = Literal["curve", "scores"]
TEMPERATURES = tuple(2.0**j for j in range(-4, 5))


@dataclass(frozen=True)
class ClosedForm(Allocator):
    """Remove more where the error curve is flat, by a formula; no search.

    Site l costs p_l when whole and loses the share s_l. q_l is the slope of its error curve at the start, error per
    unit of price, and e_l its energy: log q_l as a price-weighted z-score within the partition. The level μ is where
    the budget is spent, Σ p_l (1 - s_l) = limit:

        fermi          s_l = 1 / (1 + exp((e_l - μ)/T))                                       (1)
        softmax        s_l = min(1, exp((μ - e_l)/T))                                         (2)
        compliance     s_l = min(1, exp(μ) p_l / A_l),   A_l the signal `stiffness`           (3)
        water-filling  (3) with A_l = p_l q_l, the parabola as steep as the curve at the start (4)
        threshold      s_l = the part of site l whose units have Q_j / p_j ≤ μ                (5)

    Q_j is the rise of the error when unit j, a stretch between two rungs, goes; p_j its price. (1) minimises
    Σ p_l (e_l s_l - T S(s_l)), S the entropy of a two-state unit; (2) is its dilute limit. (3) minimises the quadratic
    energy Σ A_l s_l²: with the compliance c_l = 1ᵀ Q_l⁻¹ 1 = n_l²/A_l and one price, sites lose groups in proportion to
    c_l. (5) is the exact optimum of separable convex errors. In (1) and (2), T → ∞ is uniform and T → 0 empties the
    lowest energies first. No share is above `most`, unless the budget leaves no other choice.

    With `energy: scores` the curve is the one the pruner's unit scores draw: the sum of the least scores of as many
    units as go, as a share of the sum of all. (5) is then one quantile over the units of all sites.

    Where units of a layer are removed, (1) counts the ways to choose them, and (2) the ways to choose with a unit put
    back each time: without its bound it can ask for more than the layer has.

    The idea of an energy is from StruPrune (arXiv:2510.03246), whose equations were not found, and whose code, which is
    public, gives every layer the same share: (1)-(5) are derived. The error table costs nothing to read, so T is the
    best on it unless given, and the answer is the start where that is better on it: never worse than uniform in the
    sum of that table. On SmolLM2-135M at 30 % (1) has a perplexity of 44.43 on nats and of 73.50 on relative errors,
    which massive activations mislead, where uniform has 53.46.
    """

    rule: Rule = "fermi"
    table: Literal["errors", "fisher"] = "fisher"  # the error curve: nats, or relative errors
    energy: Energy = "curve"  # what a site loses: by its error curve, or by the pruner's unit scores
    most: float = 1.0  # largest share of a site that may be removed
    temperature: float | None = None  # T of (1) and (2), in standard deviations of the energy; None: best on the table

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.most <= 1:
            raise ValueError(f"0 < most ≤ 1, not {self.most}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"a temperature is above 0, not {self.temperature}")

    @property
    def signals(self) -> tuple[str, ...]:
        return ("stiffness",) if self.rule == "compliance" else ()

    @property
    def needs(self) -> frozenset[str]:
        return needed(self.table) | ({"scores"} if self.energy == "scores" else set())

    def search(self, problem: Problem) -> Search:
        problem = replace(problem, errors=told(problem, self.table))
        warm = self.temperature is None and self.rule in ("fermi", "softmax")
        temperatures = TEMPERATURES if warm else (self.temperature or 1.0,)
        answers = [problem.start, *(problem.space.nearest(self.wish(problem, t)) for t in temperatures)]
        best = min(answers, key=lambda a: sum(problem.error(i, k) for i, k in enumerate(a)))
        yield [Query(best)]
        return best

    def wish(self, problem: Problem, temperature: float = 1.0) -> list[float]:
        """Kept groups per site, before rounding; a site without a price keeps all."""
        problem = separable(problem) if self.energy == "scores" else problem
        space = problem.space
        wish = [float(ladder[-1]) for ladder in space.ladders]
        for members, limit in space.open_partitions:
            whole = {i: space.budget.price(space.sites[i], space.sites[i].n_groups) for i in members}
            paid = [i for i in members if whole[i]]
            if self.rule == "threshold":
                units = [_units(problem, i) for i in paid]
                caps = [self.most * space.sites[i].n_groups for i in paid]
                removed = below_threshold(units, sum(space.prices[i][-1] for i in paid) - limit, caps)
                for i, groups in zip(paid, removed, strict=True):
                    wish[i] -= groups
                continue
            prices = [whole[i] for i in paid]
            if self.rule == "compliance":
                e = logs([problem.signals[0][i] / whole[i] for i in paid])
            else:
                e = logs(slopes(problem, paid))  # (4) as it is
            if self.rule in ("fermi", "softmax"):
                e = [x / temperature for x in standard(e, prices)]
            law = fermi if self.rule == "fermi" else dilute
            removed = level(e, prices, limit, lambda x, law=law: min(self.most, law(x)))  # (1), (2), (3)
            for i, share in zip(paid, removed, strict=True):
                wish[i] = space.sites[i].n_groups * (1 - share)
        return wish


@dataclass(frozen=True)
class Unit:
    """A stretch of an error curve, from one rung to the next below."""

    score: float  # error per unit of price, Q_j / p_j
    price: int
    groups: int


def fermi(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + math.tanh(x / 2))


def dilute(x: float) -> float:
    """min(1, exp(x)): Fermi's law where few are taken."""
    return math.exp(min(x, 0.0))


def level(
    energies: Sequence[float], prices: Sequence[int], limit: int, occupied: Callable[[float], float]
) -> list[float]:
    """The shares s_l = occupied(μ - e_l) with μ such that Σ p_l (1 - s_l) = limit, or as near as shares in 0..1 get."""
    low, high = min(energies, default=0.0) - 50, max(energies, default=0.0) + 50
    for _ in range(100):
        middle = (low + high) / 2
        kept = math.fsum(p * (1 - occupied(middle - e)) for p, e in zip(prices, energies, strict=True))
        low, high = (middle, high) if kept > limit else (low, middle)
    return [occupied(high - e) for e in energies]


def standard(energies: Sequence[float], prices: Sequence[int]) -> list[float]:
    """Price-weighted z-scores; zeros where all are equal."""
    total = sum(prices)
    mean = sum(p * e for p, e in zip(prices, energies, strict=True)) / max(total, 1)
    spread = math.sqrt(sum(p * (e - mean) ** 2 for p, e in zip(prices, energies, strict=True)) / max(total, 1))
    return [(e - mean) / spread if spread > 1e-12 * abs(mean) else 0.0 for e in energies]


def logs(values: Sequence[float]) -> list[float]:
    """Logarithms, those of values below a thousandth of the mean as if they were that.

    Slopes and stiffnesses of relative errors differ by orders of magnitude: a few steep sites would own the z-score.
    """
    floor = 1e-3 * sum(max(x, 0.0) for x in values) / max(len(values), 1) or 1.0
    return [math.log(max(x, floor)) for x in values]


def separable(problem: Problem) -> Problem:
    """The problem with the error curves that unit scores draw: the least sum of scores of as many units as go."""
    assert problem.scores is not None
    curves = []
    for site, ladder, scores in zip(problem.space.sites, problem.space.ladders, problem.scores, strict=True):
        largest = max(map(abs, scores)) or 1.0
        parts = sorted(s / largest for s in scores)  # sums of huge scores are infinite
        lost = list(accumulate(parts, initial=0.0))
        total = math.fsum(map(abs, parts)) or 1.0
        curves.append(tuple(lost[site.n_groups - kept] / total for kept in ladder))
    return replace(problem, errors=tuple(curves))


def slopes(problem: Problem, sites: Sequence[int]) -> list[float]:
    """Error per unit of price between the rungs beside the start."""
    found = []
    for i in sites:
        ladder, price = problem.space.ladders[i], problem.space.prices[i]
        r = ladder.index(problem.start[i])
        found.append(_score(problem.errors[i], price, max(r - 1, 0), min(r + 1, len(ladder) - 1)))
    return found


def below_threshold(units: Sequence[Sequence[Unit]], excess: float, caps: Sequence[float]) -> list[float]:
    """Groups to remove per site: units of the lowest score first, the last in part, until `excess` is saved.

    Scores rise down every ladder, so no unit goes before the one above it. No site loses more groups than its cap.
    """
    removed = [0.0] * len(units)
    for _, i, unit in sorted((u.score, i, u) for i, some in enumerate(units) for u in some):  # (5)
        if excess <= 0:
            break
        part = min(1.0, excess / unit.price if unit.price else 1.0, (caps[i] - removed[i]) / unit.groups)
        removed[i] += part * unit.groups
        excess -= part * unit.price
    return removed


def _units(problem: Problem, i: int) -> list[Unit]:
    """The error curve of a site from its top rung down, its convex hull: scores never fall."""
    ladder, price, error = problem.space.ladders[i], problem.space.prices[i], problem.errors[i]
    hull = [len(ladder) - 1]
    for r in reversed(range(len(ladder) - 1)):
        while len(hull) > 1 and _score(error, price, r, hull[-1]) <= _score(error, price, hull[-1], hull[-2]):
            hull.pop()
        hull.append(r)
    return [Unit(_score(error, price, r, q), price[q] - price[r], ladder[q] - ladder[r]) for q, r in pairwise(hull)]


def _score(error: Sequence[float], price: Sequence[int], low: int, high: int) -> float:
    """Error per unit of price between two rungs."""
    return (error[low] - error[high]) / max(price[high] - price[low], 1)
