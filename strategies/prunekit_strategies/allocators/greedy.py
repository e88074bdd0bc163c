"""Greedy descent: from the start, repeatedly the exchange that gains most."""

import math
from dataclasses import dataclass
from heapq import nsmallest
from typing import Literal

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, check_choices
from prunekit_strategies.allocators.probes import Source, Table, needed, started, total

By = Literal["table", "questions"]


@dataclass(frozen=True)
class Greedy(Allocator):
    """Go to the best neighbour by one exchange until none is better.

        a ← argmin_{a' ∈ N(a)} J(a')   while that lowers J                                     (1)

    N(a) are the exchanges: one rung from one site to another, at the price of the dearer. `by: table` descends on the
    additive table and asks about the end; on convex curves with steps of one price that is the optimum. `by:
    questions` asks about the `width` neighbours the table likes best and believes the answers, so it goes on where
    the table is at its end. The last word between the end and the start is on all tokens.
    """

    by: By = "questions"
    table: Source = "probes"  # what the table tells (see Probes)
    width: int | None = 12  # neighbours asked per step; None: all, and no table
    steps: int = 25  # most exchanges by questions
    tokens: int = 2_048  # to judge a neighbour on
    probe_tokens: int = 1_024  # to judge a probe on

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.steps, self.tokens, self.probe_tokens, 1 if self.width is None else self.width) < 1:
            raise ValueError("width, steps, tokens and probe_tokens are at least 1")

    @property
    def needs(self) -> frozenset[str]:
        return needed(self.table)

    def search(self, problem: Problem) -> Search:
        space, here, table = problem.space, problem.start, problem.errors
        if self.by == "table" or self.width is not None:
            table = yield from started(problem, self.table, self.probe_tokens)
            here = descended(space, table, here)
        if self.by == "questions":
            tokens = min(self.tokens, problem.tokens) or None
            (least,) = yield [Query(here, tokens)]
            for _ in range(self.steps):
                around = list(space.swaps(here))
                if self.width is not None:
                    around = nsmallest(self.width, around, key=lambda a: (total(space, table, a), a))
                losses = (yield [Query(a, tokens) for a in around]) if around else [math.inf]
                if not min(losses) < least:
                    break
                least, here = min(zip(losses, around, strict=True))  # (1)
        ends = list(dict.fromkeys([here, problem.start]))
        losses = yield [Query(a) for a in ends]
        return min(zip(losses, ends, strict=True))[1]


def descended(space: Space, table: Table, here: Allocation) -> Allocation:
    """The end of (1) on a table."""
    least = total(space, table, here)
    while around := list(space.swaps(here)):
        low, there = min((total(space, table, a), a) for a in around)
        if not low < least:
            break
        least, here = low, there
    return here
