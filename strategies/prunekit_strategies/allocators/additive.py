"""Allocators that believe in an additive table: which table, which candidates, and the objective's last word."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from prunekit import Allocation, Allocator, Problem, Query, Search, Space
from prunekit_strategies.allocators.probes import Probes, Source, Table, check_source

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
    candidates: int = 8  # lowest allocations of the table that are judged
    tokens: int = 16_384  # to judge a candidate on
    stride: float = 1 / 16  # distance of rungs, share of a site's groups; 1: drop or keep

    def __post_init__(self) -> None:
        check_source(self.table)
        if self.around not in get_args(Around):
            raise ValueError(f"no centre {self.around!r}; there are {', '.join(get_args(Around))}")
        if min(self.candidates, self.tokens) < 1 or not 0 < self.stride <= 1:
            raise ValueError("candidates and tokens are at least 1, stride is in 0..1")
        self._probes  # noqa: B018 (it refuses what it cannot use)

    @property
    def _probes(self) -> Probes:
        return Probes(self.reach, self.points, self.probe_tokens)

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
        table = problem.errors
        if self.table == "probes":
            dense = tuple(site.n_groups for site in problem.space.sites)
            table = yield from self._probes.table(problem, problem.start if self.around == "start" else dense)
        found = [*self.solutions(problem.space, table), problem.start]
        candidates = [a for a in dict.fromkeys(found) if self.keeps(problem.space, a)]
        losses = yield [Query(a, min(self.tokens, problem.tokens) or None) for a in candidates]
        return min(zip(losses, candidates, strict=True))[1]
