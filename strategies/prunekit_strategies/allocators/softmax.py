"""Allocations in closed form: what each site loses per parameter, seen as an energy, decides how much it keeps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from prunekit import Allocator, Problem, Query, Search

Rule = Literal["fermi", "softmax", "threshold", "compliance"]
TEMPERATURES = tuple(2.0**j for j in range(-4, 5))


@dataclass(frozen=True)
class ClosedForm(Allocator):
    """Remove more where the error curve is flat, by a formula; no search.

    Site l costs p_l when whole and loses the share s_l. q_l is the slope of its error curve at the start, error per
    unit of price, and e_l its energy: log q_l as a price-weighted z-score within the purse. The level μ is where the
    budget is spent, Σ p_l (1 - s_l) = limit:

        fermi       s_l = 1 / (1 + exp((e_l - μ)/T))                                          (1)
        softmax     s_l = min(1, exp((μ - e_l)/T))                                            (2)
        compliance  s_l = min(1, exp(μ) / q_l)                                                (3)
        threshold   s_l = the part of site l whose units have Q_j / p_j ≤ μ                   (4)

    Q_j is the rise of the error when unit j, a stretch between two rungs, goes; p_j its price. (1) minimises
    Σ p_l (e_l s_l - T S(s_l)), S the entropy of a two-state unit; (2) is its dilute limit. (3) gives way in
    proportion to softness: it minimises the quadratic energy Σ ½ p_l q_l s_l² and is c_l / Σ c with c_l = Σ_j 1/Q_j
    for units as stiff as those at the start. (4) is the exact optimum of separable convex errors.
    In (1) and (2), T → ∞ is uniform and T → 0 empties the lowest energies first.

    The idea of an energy is from StruPrune (arXiv:2510.03246), whose formulas are not public: these are ours. The
    error table costs nothing to read, so T is the best on it unless given, and the answer is the start where that is
    better on it: never worse than uniform in expected error.
    """

    rule: Rule = "fermi"
    temperature: float | None = None  # T of (1) and (2), in standard deviations of the energy; None: best on the table

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"no rule {self.rule!r}; there are {', '.join(get_args(Rule))}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"a temperature is above 0, not {self.temperature}")

    def search(self, problem: Problem) -> Search:
        warm = self.temperature is None and self.rule in ("fermi", "softmax")
        temperatures = TEMPERATURES if warm else (self.temperature or 1.0,)
        answers = [problem.start, *(problem.space.nearest(self.wish(problem, t)) for t in temperatures)]
        best = min(answers, key=lambda a: sum(problem.error(i, k) for i, k in enumerate(a)))
        yield [Query(best)]
        return best

    def wish(self, problem: Problem, temperature: float = 1.0) -> list[float]:
        """Kept groups per site, before rounding; a site without a price keeps all."""
        space = problem.space
        wish = [float(ladder[-1]) for ladder in space.ladders]
        for members, limit in space.purses:
            whole = {i: space.budget.price(space.sites[i], space.sites[i].n_groups) for i in members}
            paid = [i for i in members if whole[i]]
            if self.rule == "threshold":
                units = [_units(problem, i) for i in paid]
                removed = below_threshold(units, sum(space.prices[i][-1] for i in paid) - limit)
                for i, groups in zip(paid, removed, strict=True):
                    wish[i] -= groups
                continue
            e, prices = log_slopes(problem, paid), [whole[i] for i in paid]
            if self.rule != "compliance":
                e = [x / temperature for x in standard(e, prices)]
            removed = level(e, prices, limit, fermi if self.rule == "fermi" else dilute)  # (1), (2), (3)
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


def log_slopes(problem: Problem, sites: Sequence[int]) -> list[float]:
    """Logarithm of the error per unit of price between the rungs beside the start.

    The logarithm, because slopes of relative errors differ by orders of magnitude: a few steep sites would own
    the z-score.
    """
    slopes = []
    for i in sites:
        ladder, price = problem.space.ladders[i], problem.space.prices[i]
        r = ladder.index(problem.start[i])
        slopes.append(_score(problem.errors[i], price, max(r - 1, 0), min(r + 1, len(ladder) - 1)))
    floor = 1e-3 * sum(max(x, 0.0) for x in slopes) / max(len(slopes), 1) or 1.0
    return [math.log(max(x, floor)) for x in slopes]


def below_threshold(units: Sequence[Sequence[Unit]], excess: float) -> list[float]:
    """Groups to remove per site: units of the lowest score first, the last in part, until `excess` is saved.

    Scores rise down every ladder, so no unit goes before the one above it.
    """
    removed = [0.0] * len(units)
    for _, i, unit in sorted((u.score, i, u) for i, some in enumerate(units) for u in some):  # (4)
        if excess <= 0:
            break
        part = min(1.0, excess / unit.price) if unit.price else 1.0
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
