"""Remove whole sub-layers or whole blocks, one after the other: all of it or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

from prunekit import Allocation, Allocator, Problem, Query, Search, Signal, Space, check_choices
from prunekit_strategies.allocators.competing import best_of
from prunekit_strategies.allocators.removals import all_or_none, emptied, excess, saved, settled
from prunekit_strategies.signals.influence import Influence


@dataclass(frozen=True)
class Drop(Allocator):
    """From the dense model, remove the unit that is missed least until the budget is met.

    With J(R) the loss without the units R, u a unit that still saves something the budget wants:

        greedy   R ← R ∪ {argmin_u J(R ∪ {u})}                                              (1)
        once     the units in the order of J({u})                                           (2)

    (1) asks Σ_{t<T} (U - t) questions for T of U units, (2) asks U. `by: scores` is (2) on the sum of the pruner's
    scores of a unit's groups, `by: influence` on 1 - E cos of the residual stream before and behind it, both without a
    question. `per_price` divides what J rises by by what is saved.

    What the last removal saves beyond the budget is given back: the removed sub-layer that can take most of it keeps so
    many groups after all.

    Sources: (1) on sub-layers by perplexity is BlockPruner (Zhong et al., arXiv:2406.10594). (2) on blocks, by
    perplexity or by Taylor scores, is Shortened LLaMA (Kim et al., arXiv:2402.02834), which spares the first four and
    the last two of 32 blocks: `spare` of a recipe. (2) on blocks by influence is ShortGPT (Men et al.,
    arXiv:2403.03853), on attention and MLP, together or one of them, LLM-Drop (He et al., arXiv:2406.15786). (2) on
    operators by `latent-stats` is LD-Pruner (Castells et al., arXiv:2404.11936). They remove a number of units; here
    the budget is met, and the start competes, so that the answer is never worse than it on the objective; `compete:
    false` is the papers'.
    """

    unit: Literal["sub-layers", "blocks"] = "sub-layers"
    order: Literal["greedy", "once"] = "greedy"
    by: Literal["loss", "scores", "influence"] = "loss"  # what a unit is worth: what the objective or the pruner's
    # scores say, or how far it turns the residual stream
    per_price: bool = False  # relative to what is saved of the budget
    tokens: int | None = None  # to judge a removal on; None: all
    compete: bool = True  # let the start win where the objective prefers it

    def __post_init__(self) -> None:
        check_choices(self)
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is at least 1, not {self.tokens}")
        if self.by != "loss" and self.order == "greedy":
            raise ValueError(f"{self.by} of a unit was measured with all there, so it orders them once: order: once")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"} if self.by == "scores" else ())

    @property
    def signals(self) -> tuple[Signal, ...]:
        since: Literal["block", "sub-layer"] = "block" if self.unit == "blocks" else "sub-layer"
        return (Influence(since),) if self.by == "influence" else ()

    @property
    def asks(self) -> bool:
        return self.by == "loss" or self.compete

    def first_space(self, whole: Space) -> Space:
        return all_or_none(whole)

    def last_space(self, whole: Space, best: Allocation) -> Space:
        return whole.zoomed(settled(whole, best), reach=0)

    def search(self, problem: Problem) -> Search:
        space = problem.space
        units = tuple((i,) for i in range(len(space.sites)))
        if self.unit == "blocks":
            blocks = sorted({site.block for site in space.sites})
            units = tuple(tuple(i for i, site in enumerate(space.sites) if site.block == b) for b in blocks)
        top = tuple(ladder[-1] for ladder in space.ladders)
        if self.by == "scores":
            assert problem.scores is not None
            worth = [sum(sum(problem.scores[i]) for i in unit) for unit in units]
            answer = self._in_order(space, top, units, worth)
        elif self.by == "influence":
            (turned,) = problem.signals  # at the last sub-layer of a block, that of the block
            answer = self._in_order(space, top, units, [turned[unit[-1]] for unit in units])
        elif self.order == "once":
            answer = yield from self._once(problem, top, units)
        else:
            answer = yield from self._greedy(problem, top, units)
        if not self.compete:
            if not self.asks:
                return answer
            yield [Query(answer)]  # its loss goes into the ledger
            return answer
        answers = list(dict.fromkeys([answer, problem.start]))
        losses = yield [Query(a) for a in answers]
        return best_of(type(self).__name__, problem, answers, losses)

    def _greedy(self, problem: Problem, here: Allocation, units: Sequence[Sequence[int]]) -> Search:
        """(1)."""
        space, base = problem.space, 0.0
        if self.per_price and excess(space, here):
            (base,) = yield [self._query(here)]
        while over := excess(space, here):
            ways = {emptied(space, here, unit): None for unit in units}
            able = [there for there in ways if saved(space, here, there, over)]
            losses = yield [self._query(there) for there in able]
            prices = [saved(space, here, there, over) if self.per_price else 1 for there in able]
            rises = [(loss - base) / price for loss, price in zip(losses, prices, strict=True)]
            chosen = min(range(len(able)), key=lambda n: (isnan(rises[n]), rises[n]))
            here, base = able[chosen], losses[chosen] if self.per_price else 0.0  # (1)
        return here

    def _once(self, problem: Problem, top: Allocation, units: Sequence[Sequence[int]]) -> Search:
        """(2)."""
        space = problem.space
        if not (over := excess(space, top)):
            return top
        alone = [emptied(space, top, unit) for unit in units]
        able = [there for there in dict.fromkeys(alone) if saved(space, top, there, over)]
        losses = yield [self._query(there) for there in ([top, *able] if self.per_price else able)]
        base = losses[0] if self.per_price else 0.0
        found = dict(zip(able, losses[1:] if self.per_price else losses, strict=True))
        return self._in_order(space, top, units, [found.get(there, base) - base for there in alone])

    def _in_order(
        self, space: Space, here: Allocation, units: Sequence[Sequence[int]], worth: Sequence[float]
    ) -> Allocation:
        """The units of least worth removed, one after the other, as long as they save something that is wanted."""
        top, over = here, excess(space, here)

        def rank(n: int) -> tuple[bool, float, int]:
            price = saved(space, top, emptied(space, top, units[n]), over) if self.per_price else 1
            rise = worth[n] / max(price, 1)
            return isnan(rise), rise, n

        for n in sorted(range(len(units)), key=rank):
            if not (over := excess(space, here)):
                break
            there = emptied(space, here, units[n])
            here = there if saved(space, here, there, over) else here
        return here

    def _query(self, allocation: Allocation) -> Query:
        return Query(allocation, self.tokens, probe=True)  # on the way the budget is exceeded
