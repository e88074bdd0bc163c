"""MoP: depth against width, step by step; the better branch goes on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, check_choices
from prunekit_strategies.allocators.competing import best_of
from prunekit_strategies.allocators.removals import settled


@dataclass(frozen=True)
class MixtureOfPruners(Allocator):
    """At every step one block goes, or all that are left get narrower, whichever has the lower loss at the same size.

    With D the blocks that are gone, a step of at least the price of one block takes the budget from dense to the limit
    in n steps, C_t = C_0 - t (C_0 - limit) / n. Step t compares

        depth   D ∪ {b}, the others at one common share that costs C_t                      (1)
        width   D, the others at one common share that costs C_t                            (2)

    and goes on from the better. b is the block of the `block` rule: the third last of those that are left, as in the
    released code (`late`), or the one whose removal has the least loss (`best`), which asks one question per block.

    Source: MoP (Yamamoto et al., arXiv:2602.06127): two branches at each iteration, of which one advances the path. The
    released code takes the sequence of depth and width as an option, and its scripts give sequences that were drawn
    at random before (`branch: random`); that the objective chooses (`better`) is derived. Ours: both branches have the
    same size at every step, what was removed stays removed, and the start competes (`compete: false` leaves it out).
    """

    branch: Literal["better", "random"] = "better"  # which goes on: of the lower loss, or drawn from the seed
    block: Literal["late", "best"] = "late"  # the third last that is left, or the one that is missed least
    steps: int | None = None  # n; None: as many as whole blocks go into what is removed
    tokens: int | None = None  # to judge a branch on; None: all
    compete: bool = True  # let the start win where the objective prefers it
    stride: float = 1 / 32  # distance of the rungs that branches are on, share of a site's groups

    def __post_init__(self) -> None:
        check_choices(self)
        if any(n is not None and n < 1 for n in (self.steps, self.tokens)):
            raise ValueError(f"steps and tokens are at least 1, not {self.steps} and {self.tokens}")
        if not 0 < self.stride <= 1:
            raise ValueError(f"0 < stride ≤ 1, not {self.stride}")

    def first_space(self, whole: Space) -> Space:
        return whole.zoomed(whole.uniform(), stride=self.stride, reach=-int(-1 // self.stride))

    def last_space(self, whole: Space, best: Allocation) -> Space:
        return whole.zoomed(settled(whole, best), reach=0)

    def search(self, problem: Problem) -> Search:
        space = problem.space
        gone: frozenset[int] = frozenset()  # D
        here, count, rng = problem.start, self._count(space), random.Random(problem.seed)
        for t in range(1, count + 1):
            small = _smaller(space, t, count)
            deep = [b for b in self._blocks(space, gone) if _fits(small, gone | {b})]
            branches = {_narrowed(small, now): now for now in [gone, *(gone | {b} for b in deep)]}  # (2), (1)
            if self.branch == "random":
                here = rng.choice(list(branches))
            else:
                losses = yield [Query(a, self.tokens, probe=True) for a in branches]
                here = min(zip(losses, branches, strict=True))[1]
            gone = branches[here]
        answers = list(dict.fromkeys([here, problem.start] if self.compete or not count else [here]))
        losses = yield [Query(a) for a in answers]
        return best_of(type(self).__name__, problem, answers, losses)

    def _count(self, space: Space) -> int:
        """n: steps of no less than a mean block, or what was asked; none where nothing need go."""
        top = sum(prices[-1] for prices in space.prices)
        removed = top - sum(min(limit, sum(space.prices[i][-1] for i in m)) for m, limit in space.partitions)
        if removed <= 0:
            return 0
        free = sum(prices[-1] - prices[0] for prices in space.prices)
        block = free / len({site.block for site in space.sites})
        return self.steps or max(1, int(removed / block))

    def _blocks(self, space: Space, gone: frozenset[int]) -> Sequence[int]:
        """Blocks that may go next."""
        able = {s.block for s, ladder in zip(space.sites, space.ladders, strict=True) if len(ladder) > 1}
        left = sorted({site.block for site in space.sites} - gone)
        if self.block == "best":
            return [b for b in left if b in able]
        return [b for b in left[:-2][::-1] if b in able][:1]


def _smaller(space: Space, t: int, steps: int) -> Space:
    """The space under the budget of step t, C_t, in every partition."""

    def at(members: Sequence[int], limit: int) -> int:
        top = sum(space.prices[i][-1] for i in members)
        return max(limit, top - (top - limit) * t // steps) if top > limit else limit

    limits = [at(members, limit) for members, limit in space.partitions]
    kinds = tuple((kind, limit) for (kind, _), limit in zip(space.budget.by_kind, limits, strict=False))
    return replace(space, budget=replace(space.budget, limit=sum(limits), by_kind=kinds))


def _kept_down(space: Space, gone: frozenset[int]) -> Space:
    pairs = zip(space.sites, space.ladders, strict=True)
    return replace(space, ladders=tuple(ladder[:1] if site.block in gone else ladder for site, ladder in pairs))


def _fits(space: Space, gone: frozenset[int]) -> bool:
    """Whether the blocks that are left have something to lose: else what goes is more than the step wants."""
    kept = _kept_down(space, gone)
    return all(sum(kept.prices[i][-1] for i in members) >= limit for members, limit in kept.partitions)


def _narrowed(space: Space, gone: frozenset[int]) -> Allocation:
    """Some blocks gone, the others at one common share that spends the budget."""
    return _kept_down(space, gone).uniform()
