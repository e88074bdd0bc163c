"""Ratios that rise or fall over depth: SlimGPT's incremental pruning ratio and ATP's arithmetic progression."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prunekit import Allocator, Problem, Query, Search, check_choices
from prunekit_strategies.allocators.competing import best_of

Shape = Literal["log-increase", "linear-increase", "uniform", "linear-decrease", "log-decrease"]
Bends = Literal["all", "attention", "mlp"]


@dataclass(frozen=True)
class Schedule(Allocator):
    """Remove a share r_b of block b that follows a curve over depth; the mean is what the budget asks.

        r_b = r_0 + (r_1 - r_0) g_b,   Σ_b p_b r_b = r̄ Σ_b p_b                                (1)

    with g_b from 0 to 1 over the L blocks and p_b the price of block b:

        log-increase     g_b = log(b + 1) / log L                                             (2)
        linear-increase  g_b = b / (L - 1)                                                    (3)

    and both mirrored for a decrease. r_0 = `lowest` and r_1 solves (1); where that is above `highest`, r_1 = `highest`
    and r_0 solves (1). `grid` bends the curve by degrees,

        r_b(t) = r̄ + t (r_b - r̄),   t = 1/grid, 2/grid, …, 1                                  (4)

    and the objective chooses.

    Source: (1), (2) SlimGPT (Ling et al., arXiv:2412.18110), increase by logarithm; its ablation has the other shapes.
    ATP (Huang et al., arXiv:2502.14770) is (4) on (3): r_b = r̄ - β (L - 1)/2 + β b with β up to
    min(2 r̄, 2 (1 - r̄)) / (L - 1), which is t = 1 at `highest` 1; its grid is β = 0.002, 0.004, …, ours has equal
    degrees up to the largest β.
    We differ: means are weighted by price and the budget is met exactly, also by unequal blocks; r_0 is not published,
    0 fits the sizes that are. The start competes, so that the answer is never worse than uniform on the objective;
    `compete: false` is the paper's.
    """

    shape: Shape = "log-increase"
    lowest: float = 0.0  # r_0, the smallest share removed
    highest: float = 0.9  # the largest share removed
    grid: int = 1  # degrees of bending to try; ATP's search
    bends: Bends = "all"  # kinds of site that follow the curve; the others stay at r̄
    tokens: int | None = None  # to judge the curves on; None: all
    compete: bool = True  # let the start win where the objective prefers it

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.lowest < self.highest <= 1:
            raise ValueError(f"0 ≤ lowest < highest ≤ 1, not {self.lowest} and {self.highest}")
        if self.grid < 1 or (self.tokens is not None and self.tokens < 1):
            raise ValueError("grid and tokens are at least 1")

    def search(self, problem: Problem) -> Search:
        wishes = [self.wish(problem, (j + 1) / self.grid) for j in range(self.grid)]
        answers = dict.fromkeys(problem.space.nearest(wish) for wish in wishes)
        if self.compete:
            answers = {problem.start: None} | answers
        losses = yield [Query(a, self.tokens) for a in answers]
        pairs = sorted(zip(answers, losses, strict=True))  # on a tie the lowest counts
        return best_of(type(self).__name__, problem, [a for a, _ in pairs], [loss for _, loss in pairs])

    def wish(self, problem: Problem, bend: float = 1.0) -> list[float]:
        """Kept groups per site, before rounding."""
        space = problem.space
        wish = [float(site.n_groups) for site in space.sites]  # of those that are spared
        for members, limit in space.open_partitions:
            price = {i: space.budget.price(space.sites[i], space.sites[i].n_groups) for i in members}
            mean = 1 - limit / max(sum(price.values()), 1)
            bent = [i for i in members if self.bends in ("all", space.sites[i].kind)]
            depth = 1 + max(s.block for s in space.sites)
            curve = rising(self.shape, depth)
            blocks = [0] * depth
            for i in bent:
                blocks[space.sites[i].block] += price[i]
            removed = ratios(curve, blocks, mean, self.lowest, self.highest)
            for i in members:
                share = mean + bend * (removed[space.sites[i].block] - mean) if i in bent else mean  # (4)
                wish[i] = space.sites[i].n_groups * (1 - share)
        return wish


def rising(shape: Shape, depth: int) -> list[float]:
    """g_b of (1), block by block; all 0 for the uniform shape and for one block."""
    if shape == "uniform" or depth == 1:
        return [0.0] * depth
    log = shape.startswith("log")
    curve = [math.log(b + 1) / math.log(depth) if log else b / (depth - 1) for b in range(depth)]  # (2), (3)
    return curve if shape.endswith("increase") else curve[::-1]


def ratios(curve: Sequence[float], prices: Sequence[int], mean: float, lowest: float, highest: float) -> list[float]:
    """r_b of (1); all equal to the mean where no curve between `lowest` and `highest` has it."""
    part = sum(p * g for p, g in zip(prices, curve, strict=True)) / max(sum(prices), 1)  # κ, the mean of g
    if not 0 < part < 1 or not lowest < mean < highest:
        return [mean] * len(curve)
    low, high = lowest, lowest + (mean - lowest) / part
    if high > highest:
        low, high = (mean - highest * part) / (1 - part), highest
    return [low + (high - low) * g for g in curve]
