"""Allocators that believe in an additive table: which table, which candidates, and the objective's last word."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, check_choices
from prunekit_strategies.allocators.probes import Probes, Source, Table, needed, told

__all__ = ["Additive", "Table"]

Around = Literal["start", "dense"]


@dataclass(frozen=True)
class Additive(Allocator):
    """Get a table, let a solver propose, ask the objective which proposal is best; the start competes."""

    table: Source = "probes"  # what the table tells (see Probes)
    around: Around = "start"  # the centre of the single changes
    reach: float = 0.25  # farthest change, share of a site's groups
    points: int = 1  # counts asked on either side of the centre
    probe_tokens: int = 4_096  # to judge a probe on
    rounds: int = 1  # tables of probes: each around the answer of the one before, with half its reach
    candidates: int = 8  # lowest allocations of the table that are judged
    tokens: int = 16_384  # to judge a candidate on
    stride: float = 1 / 16  # distance of rungs, share of a site's groups; 1: drop or keep

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.rounds, self.candidates, self.tokens) < 1 or not 0 < self.stride <= 1:
            raise ValueError("rounds, candidates and tokens are at least 1, stride is in 0..1")
        if self.rounds > 1 and self.table != "probes":
            raise ValueError(
                f"a table of {self.table} is the same in every round: rounds={self.rounds} is for `probes`"
            )
        Probes(self.reach, self.points, self.probe_tokens)  # refuses what it cannot use

    @property
    def needs(self) -> frozenset[str]:
        return needed(self.table)

    @property
    def asks(self) -> bool:
        """One candidate of a table that is there needs no judgement."""
        return self.table == "probes" or self.candidates > 1

    @abstractmethod
    def solutions(self, space: Space, table: Table) -> Iterable[Allocation]:
        """The allocations worth a question; all feasible."""

    def keeps(self, space: Space, allocation: Allocation) -> bool:
        """Whether an allocation may be the answer."""
        return space.is_feasible(allocation)

    def first_space(self, whole: Space) -> Space:
        # rungs from the whole site down: with a stride of 1 only the two ends
        dense = tuple(ladder[-1] for ladder in whole.ladders)
        return whole.zoomed(dense, stride=self.stride, reach=2 * math.ceil(1 / self.stride))

    def search(self, problem: Problem) -> Search:
        space, best = problem.space, problem.start
        dense = tuple(site.n_groups for site in space.sites)
        for n in range(self.rounds):
            if self.table != "probes":
                table = told(problem, self.table)
            else:
                centre = dense if self.around == "dense" and n == 0 else best
                table = yield from Probes(self.reach / 2**n, self.points, self.probe_tokens).table(problem, centre)
            proposed = dict.fromkeys([*self.solutions(space, table), best])
            candidates = [a for a in proposed if self.keeps(space, a)]
            if not self.asks:
                return candidates[0]
            losses = yield [Query(a, min(self.tokens, problem.tokens) or None) for a in candidates]
            _, best = min(zip(losses, candidates, strict=True))
        return best
