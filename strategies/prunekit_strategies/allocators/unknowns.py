"""Level space for samplers: real numbers in -1..1 become allocations with the exact budget."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, check_choices
from prunekit_strategies.allocators.probes import Source, judged_again, needed, started

Ask = Callable[[int], list[tuple[Any, Sequence[float]]]]
"""So many new points of a sampler, and the x in -1..1 of each."""
Tell = Callable[[list[tuple[Any, float]]], None]
"""Points and their losses."""


@dataclass(frozen=True)
class Unknowns:
    """Deviations from a centre, in shares of the sites, decoded by the nearest allocation that spends the budget.

        kept_i = c_i + reach n_i Σ_j x_j d_ij                                                  (1)

    One unknown per site: d_ij = [i = j]. With `waves`, for sites i of kind k in block b of L,

        d_ij = [k = kind of j] cos(π w_j (b + ½)/L),   w_j = 0..waves                          (2)

    so that few unknowns bend a deep model smoothly; wave 0 trades one kind for another. Constraints never reach
    the sampler, and several x may mean one allocation.
    """

    space: Space
    centre: Allocation
    reach: float  # largest deviation, share of a site's groups
    waves: int | None = None  # None: one unknown per site

    @cached_property
    def directions(self) -> tuple[tuple[float, ...], ...]:
        """d_ij, one row per site."""
        sites = self.space.sites
        if self.waves is None:
            return tuple(tuple(float(i == j) for j in range(len(sites))) for i in range(len(sites)))
        depth = 1 + max(s.block for s in sites)
        columns = [(kind, w) for kind in sorted({s.kind for s in sites}) for w in range(self.waves + 1)]
        return tuple(
            tuple((s.kind == kind) * math.cos(math.pi * w * (s.block + 0.5) / depth) for kind, w in columns)  # (2)
            for s in sites
        )

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.directions[0])

    def decode(self, x: Sequence[float]) -> Allocation:
        """The allocation nearest to (1)."""
        return self.space.nearest(
            [
                c + self.reach * s.n_groups * sum(a * b for a, b in zip(x, d, strict=True))
                for c, s, d in zip(self.centre, self.space.sites, self.directions, strict=True)
            ]
        )


@dataclass(frozen=True)
class Sampled(Allocator):
    """A sampler of another library proposes deviations from the lowest allocation on a table.

    Allocations that were asked before answer from memory; the best few and the start are judged again on all tokens.
    """

    samples: ClassVar[int]  # per trial, at most: those that decode to known allocations cost nothing, but end too

    trials: int = 200  # allocations to ask for
    batch: int = 4  # allocations per ask
    tokens: int = 8_192  # to judge a trial on
    finalists: int = 4  # trials judged again on all tokens
    reach: float = 0.25  # largest deviation, share of a site's groups
    waves: int | None = None  # cosines over depth per kind of site instead of one unknown per site: for deep models
    warm_start: Source = "probes"  # the table whose optimum the search begins from

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.trials, self.batch, self.tokens, self.finalists) < 1 or not 0 < self.reach <= 1:
            raise ValueError("trials, batch, tokens and finalists are at least 1, reach is in 0..1")
        if self.waves is not None and self.waves < 0:
            raise ValueError(f"waves are counted from 0, not {self.waves}")

    @abstractmethod
    def opened(self, size: int, seed: int) -> tuple[Ask, Tell]:
        """A sampler of `size` unknowns; its first point is 0."""

    @property
    def needs(self) -> frozenset[str]:
        return needed(self.warm_start)

    def search(self, problem: Problem) -> Search:
        table = yield from started(problem, self.warm_start)
        unknowns = Unknowns(problem.space, problem.space.lowest(table), self.reach, self.waves)
        ask, tell = self.opened(unknowns.size, problem.seed)
        tokens, samples = min(self.tokens, problem.tokens) or None, self.samples * self.trials
        heard = dict(zip([problem.start], (yield [Query(problem.start, tokens)]), strict=True))
        while (size := min(self.batch, samples, self.trials - len(heard))) > 0:
            samples -= size
            decoded = [(point, unknowns.decode(x)) for point, x in ask(size)]
            new = list(dict.fromkeys(a for _, a in decoded if a not in heard))
            if new:
                heard |= zip(new, (yield [Query(a, tokens) for a in new]), strict=True)
            tell([(point, heard[allocation]) for point, allocation in decoded])
        return (yield from judged_again(sorted(heard, key=heard.__getitem__)[: self.finalists], problem))
