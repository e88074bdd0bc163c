"""The optimum of an additive table by dynamic programming, and the best few by the true objective."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import islice, product

import numpy as np

from prunekit import Allocation, Space
from prunekit_strategies.allocators.additive import Additive, Table

CELLS = 1 << 17  # amounts of money told apart; where there are more, prices are rounded up


@dataclass(frozen=True)
class DynamicProgramming(Additive):
    """The exact lowest allocations of an additive table, judged by the objective.

    f_i[c] is the least sum of the first i sites for at most c, with the price p_ir of rung r and its entry t_ir:

        f_i[c] = min_r f_{i-1}[c - p_ir] + t_ir                                                (1)

    and a best-first search from the last site back, with f as the exact rest of the way, meets the `candidates` lowest
    allocations in order. The start and the best depth-only allocation, every sub-layer whole or gone, join them: a
    table does not see how sites act on each other. The objective has the last word.

    Sources: the layer-wise problem as in SPDY (Frantar and Alistarh, arXiv:2201.13096); the single change from the
    dense model as score, with `around: dense`, as in ShortGPT (Men et al., arXiv:2403.03853) for depth: `stride: 1`,
    `reach: 1`, the rungs drop and keep.
    """

    def solutions(self, space: Space, table: Table) -> Iterator[Allocation]:
        best = (tightened(space, table, a) for a in lowest(space, table, 4 * self.candidates))
        yield from list(dict.fromkeys(best))[: self.candidates]
        yield depth_only(space, table)


def lowest(space: Space, table: Sequence[Sequence[float]], count: int = 1) -> list[Allocation]:
    """The feasible allocations of least Σ_i table[i][r_i], ascending.

    Exact while a partition is at most `CELLS` times the greatest common divisor of its prices. Above that prices are
    rounded up, by at most a share of 1 / `CELLS` of the partition for each site.

    Raises:
        ValueError: even the lowest rungs cost too much.
    """
    found: list[tuple[float, dict[int, int]]] = [(0.0, {})]
    for members, limit in space.partitions:
        some = list(islice(_ascending(space, table, members, limit), count))
        both = ((a + b, x | y) for (a, x), (b, y) in product(found, some))
        found = sorted(both, key=lambda item: (item[0], sorted(item[1].items())))[:count]
    return [space.allocation([rungs[i] for i in range(len(space.sites))]) for _, rungs in found]


def tightened(space: Space, table: Sequence[Sequence[float]], allocation: Allocation) -> Allocation:
    """What is left over spent, where the table does not mind."""

    def total(a: Allocation) -> float:
        return math.fsum(min(row[r], 1e300) for row, r in zip(table, space.rungs(a), strict=True))

    return min((space.nearest(allocation), allocation), key=total)


def depth_only(space: Space, table: Sequence[Sequence[float]]) -> Allocation:
    """The lowest allocation that has every site at an end of its ladder, filled up with what is left over."""
    ends = [sorted({0, len(ladder) - 1}) for ladder in space.ladders]
    (base,) = lowest(*_restricted(space, table, ends))
    above = [range(r, len(ladder)) for r, ladder in zip(space.rungs(base), space.ladders, strict=True)]
    (filled,) = lowest(*_restricted(space, table, above))
    return filled


def _restricted(
    space: Space, table: Sequence[Sequence[float]], rungs: Sequence[Sequence[int]]
) -> tuple[Space, list[list[float]]]:
    """A space and a table of some rungs only."""
    ladders = tuple(tuple(ladder[r] for r in some) for ladder, some in zip(space.ladders, rungs, strict=True))
    return replace(space, ladders=ladders), [[row[r] for r in some] for row, some in zip(table, rungs, strict=True)]


def _ascending(
    space: Space, table: Sequence[Sequence[float]], members: Sequence[int], limit: int
) -> Iterator[tuple[float, dict[int, int]]]:
    """(sum, rung by site) for the sites of a partition, lowest first, each once."""
    extra = {i: [p - space.prices[i][0] for p in space.prices[i]] for i in members}
    money = min(limit - sum(space.prices[i][0] for i in members), sum(steps[-1] for steps in extra.values()))
    if money < 0:
        raise ValueError(f"the lowest rungs cost more than the budget of {limit:,} {space.budget.metric.unit}")
    unit = math.gcd(*(p for steps in extra.values() for p in steps)) or 1
    unit *= -(-money // (unit * CELLS)) or 1
    steps = [[-(-p // unit) for p in extra[i]] for i in members]
    t = [[min(x, 1e300) for x in table[i]] for i in members]

    cells = money // unit
    f = np.zeros((len(members) + 1, cells + 1))
    for j, (prices, row) in enumerate(zip(steps, t, strict=True)):
        f[j + 1] = np.inf
        for p, x in zip(prices, row, strict=True):
            if p <= cells:
                np.minimum(f[j + 1, p:], f[j, : cells + 1 - p] + x, out=f[j + 1, p:])  # (1)

    heap: list[tuple[float, int, tuple[int, ...], int, float]] = [(float(f[-1, cells]), len(members), (), cells, 0.0)]
    while heap:
        _, j, rungs, left, paid = heappop(heap)
        if j == 0:
            yield paid, dict(zip(members, rungs, strict=True))
            continue
        for r, p in enumerate(steps[j - 1]):
            if p <= left:
                so_far = paid + t[j - 1][r]
                bound = so_far + float(f[j - 1, left - p])
                heappush(heap, (bound, j - 1, (r, *rungs), left - p, so_far))
