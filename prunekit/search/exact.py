"""The exact optimum of what a search minimises, where it can be known: to measure answers against."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Literal

import numpy as np

from prunekit.data.tokens import TokenBatch
from prunekit.plugins.guard import number, unchanged
from prunekit.plugins.objective import Objective
from prunekit.search.supernet import Supernet
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation

TINY = 64  # allocations of a space that are all judged
MOST_CELLS = 1 << 26  # of dynamic programming: sites times amounts of money
MOST_RUNGS = 1 << 18  # of all sites together, each of which is asked about
TRIED = 32  # allocations on which a table must say what the objective says
SLACK = 1e-9  # share of the largest loss by which both may differ: the rounding of sums


@dataclass(frozen=True)
class Optimum:
    """The best of a space in the eyes of its objective, beside an answer."""

    lowest: float  # the least that the objective says of any allocation of the ladders within the budget
    reached: float  # what it says of the answer
    how: Literal["table", "all"]  # of an additive table; or all allocations were judged


def find_optimum(
    net: Supernet, objective: Objective, answer: Allocation, tokens: TokenBatch, seed: int, *, judges: bool = True
) -> Optimum | None:
    """Find the exact optimum of an objective over the space of a network, and what it says of an answer.

    An objective that reads no tokens is a table where it is a sum over sites. Its table is what changes when one site
    does, from the answer a:

        t_i(r) = J(a with r at site i) - J(a),    J(b) = J(a) + Σ_i t_i(b_i)                       (1)

    The right side must hold at the optimum of the table and at `TRIED` allocations drawn at random, whatever they cost.
    In a space of at most `TINY` allocations all are judged, by any objective that does not train.

    Args:
        net: of the search.
        objective: what it minimised.
        answer: an allocation of its space.
        tokens: of the search.
        seed: of what is drawn.
        judges: whether the network has the candidates that tokens need; else it has prices alone.

    Returns:
        None where the optimum is not known, for the objective is no table or no sum, or the space is too large, or
        where there was nothing to choose.
    """
    space = net.space
    if not space.is_feasible(answer) or all(len(ladder) == 1 for ladder in space.ladders):
        return None
    reads = objective.reads(net.depth).tokens
    if not reads:
        with unchanged(objective, model=net.model):
            found = _of_table(net, objective, answer, tokens, seed)
        if found is not None:
            return found
    if (reads and not judges) or math.prod(map(len, space.ladders)) > TINY or objective.training(tokens.n_tokens):
        return None
    every = [a for a in product(*space.ladders) if space.is_feasible(a)]
    losses = dict(
        net.judged(objective, every, tokens) if reads else ((a, net.loss(objective, a, tokens)) for a in every)
    )
    lowest = min((loss for loss in losses.values() if not math.isnan(loss)), default=math.nan)
    return Optimum(lowest, losses[answer], "all") if math.isfinite(lowest) else None


def _of_table(net: Supernet, objective: Objective, answer: Allocation, tokens: TokenBatch, seed: int) -> Optimum | None:
    space = net.space
    if sum(map(len, space.ladders)) > MOST_RUNGS or _cells(space) > MOST_CELLS:
        return None

    def loss(allocation: Allocation) -> float:
        return number(objective, "its loss", objective.loss(net, allocation, tokens))

    here = loss(answer)
    table = [
        [loss((*answer[:i], kept, *answer[i + 1 :])) - here if kept != answer[i] else 0.0 for kept in ladder]
        for i, ladder in enumerate(space.ladders)
    ]  # (1)
    if not all(math.isfinite(each) for row in table for each in (here, *row)):
        return None
    best, _ = best_allocation(space, table)
    size = abs(here) + max(abs(each) for row in table for each in row)
    for allocation in (best, *islice(_drawn(space, seed), TRIED)):
        rungs = space.rungs(allocation)
        said = here + math.fsum(row[r] for row, r in zip(table, rungs, strict=True))
        if not abs(loss(allocation) - said) <= SLACK * size * len(table):
            return None
    lowest = loss(best)
    return Optimum(min(lowest, here), here, "table")  # they may differ by rounding alone


def _drawn(space: Space, seed: int) -> Iterator[Allocation]:
    rng = random.Random(seed)
    while True:
        yield tuple(rng.choice(ladder) for ladder in space.ladders)


def best_allocation(space: Space, errors: Sequence[Sequence[float]]) -> tuple[Allocation, float]:
    """The allocation of least Σ_i errors[i][r_i] under the exact budget, and that sum.

    Dynamic programming over sites and money, with f_i[c] the least sum of the first i sites for at most c:

        f_i[c] = min_r f_{i-1}[c - p_ir] + errors[i][r]                                       (1)

    Prices count from the lowest rungs, in units of their greatest common divisor g. Time is
    sites x rungs x limit / g: seconds for a small model, and for a large one as long as g is.

    Raises:
        ValueError: even the lowest rungs cost too much.
    """
    rungs = [0] * len(space.sites)
    for members, limit in space.partitions:
        extra, unit, money = _money(space, members, limit)
        if money < 0:
            raise ValueError(f"the lowest rungs cost more than the budget of {limit:,} {space.budget.metric.unit}")

        f = np.zeros(money + 1)
        choices = {}
        for i in members:
            options = np.full((len(extra[i]), money + 1), np.inf)
            for r, price in enumerate(extra[i]):
                if (p := price // unit) <= money:
                    options[r, p:] = f[: money + 1 - p] + errors[i][r]
            choices[i], f = options.argmin(axis=0).astype(np.int32), options.min(axis=0)  # (1)

        for i in reversed(members):
            rungs[i] = int(choices[i][money])
            money -= extra[i][rungs[i]] // unit
    return space.allocation(rungs), math.fsum(row[r] for row, r in zip(errors, rungs, strict=True))


def _money(space: Space, members: Sequence[int], limit: int) -> tuple[dict[int, list[int]], int, int]:
    """(prices above those of the lowest rungs, by site; their unit; how many units there are to spend)."""
    extra = {i: [p - space.prices[i][0] for p in space.prices[i]] for i in members}
    unit = math.gcd(*(p for steps in extra.values() for p in steps)) or 1
    most = sum(steps[-1] for steps in extra.values())
    return extra, unit, min(limit - sum(space.prices[i][0] for i in members), most) // unit


def _cells(space: Space) -> int:
    """Work of dynamic programming: sites times amounts of money, over all budget partitions."""
    return sum(len(members) * (_money(space, members, limit)[2] + 1) for members, limit in space.partitions)
