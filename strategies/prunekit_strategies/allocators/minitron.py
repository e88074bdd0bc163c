"""Minitron: whole blocks and equal widths of all others, in one budget."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from prunekit import Allocation, Allocator, Problem, Query, Search, Signal, Space, check_choices
from prunekit_strategies.allocators.competing import best_of
from prunekit_strategies.allocators.removals import emptied, excess, saved
from prunekit_strategies.signals.influence import Influence


@dataclass(frozen=True)
class Minitron(Allocator):
    """Drop the blocks that are missed least, keep one number of heads and one of neurons in all others.

    With J(b) the loss without block b alone, E what exceeds the budget and p the mean price of a block:

        n_D = round(D E / p)                  blocks go, those of least J, or of least influence (1)
        c_D   the same counts of every other block, by kind, of which none can be raised       (2)

    for every D of `depth`, and the candidate of least loss is the answer. (1) asks one question per block, and there is
    one per candidate. A block never goes that saves more than exceeds the budget.

    Blocks are alike, so that classes of transformers hold the result; what one more of all heads or neurons would cost
    stays unspent. With `equal: false` the rest goes to single sites, and the budget is spent exactly.

    Source: Minitron (Muralidharan et al., arXiv:2407.14679): layers ranked by perplexity without each, one number of
    heads and neurons for all, candidates over both. There a candidate is ranked after 1.8 billion tokens of training:
    `objective: after-training` is that in small. Its other criterion of a layer is block influence, `by: influence`,
    without a question. Derived is (1), where the paper lists numbers of layers. The start competes, so that the answer
    is never worse than it on the objective; `compete: false` is the paper's.
    """

    depth: float | tuple[float, ...] = (0.0, 0.25, 0.5)  # D: of what exceeds the budget, that goes with whole blocks
    equal: bool = True  # one count for all sites of a kind, so that stock classes hold the model; spends less
    by: Literal["loss", "influence"] = "loss"  # which blocks go: what the objective misses, or 1 - E cos of in and out
    tokens: int | None = None  # to judge the removal of a block on; None: all
    compete: bool = True  # let the start win where the objective prefers it

    def __post_init__(self) -> None:
        check_choices(self)
        depths = self.depths
        if not depths or any(not 0 <= depth <= 1 for depth in depths) or any(a >= b for a, b in pairwise(depths)):
            raise ValueError(f"depth is a share from 0 to 1, or several, ascending, not {self.depth}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens is at least 1, not {self.tokens}")

    @property
    def depths(self) -> tuple[float, ...]:
        """All D."""
        return self.depth if isinstance(self.depth, tuple) else (self.depth,)

    @property
    def signals(self) -> tuple[Signal, ...]:
        return (Influence("block"),) if self.by == "influence" else ()

    def first_space(self, whole: Space) -> Space:
        """Of every site nothing, all, and the counts of the candidates."""
        plans = [counts for _, counts in self._candidates(whole)]
        ends = [{ladder[0], ladder[-1]} for ladder in whole.ladders]
        ladders = tuple(
            tuple(sorted(end | {plan[i] for plan in plans})) for i, end in enumerate(ends)
        )  # fmt: skip
        return replace(whole, ladders=ladders, stride=1.0)

    def last_space(self, whole: Space, best: Allocation) -> Space:
        if self.equal:
            return whole.zoomed(best, stride=0.0, reach=0)
        gone = [kept == ladder[0] < ladder[-1] for kept, ladder in zip(best, whole.ladders, strict=True)]
        stay = tuple(ladder[:1] if out else ladder for out, ladder in zip(gone, whole.ladders, strict=True))
        return whole.zoomed(replace(whole, ladders=stay).nearest(best), stride=0.0, reach=0)

    def search(self, problem: Problem) -> Search:
        space = problem.space
        top = tuple(ladder[-1] for ladder in space.ladders)
        candidates = list(self._candidates(Space.whole(space.sites, space.budget)))
        units = _blocks(space)
        if units and any(count for count, _ in candidates):
            if self.by == "influence":
                losses = [problem.signals[0][unit[-1]] for unit in units]  # of the whole block, at its last sub-layer
            else:
                losses = yield [Query(emptied(space, top, unit), self.tokens, probe=True) for unit in units]
            units = [unit for _, unit in sorted(zip(losses, units, strict=True), key=lambda pair: pair[0])]
        asked = [emptied(space, counts, sum(units[:count], ())) for count, counts in candidates]  # (1), (2)
        able = [plan for plan in asked if space.is_feasible(plan)]  # unequal blocks may save less than was counted on
        answers = list(dict.fromkeys([*able, problem.start] if self.compete or not able else able))
        losses = yield [Query(plan) for plan in answers]
        return best_of(type(self).__name__, problem, answers, losses)

    def _candidates(self, whole: Space) -> Iterator[tuple[int, Allocation]]:
        """(how many blocks go, the count of every site that stays), each number once, ascending.

        Counted for the blocks that save least, so that any others make room for as much.
        """
        top = tuple(ladder[-1] for ladder in whole.ladders)
        over, units = excess(whole, top), _blocks(whole)
        cheap = sorted(units, key=lambda unit: sum(whole.prices[i][-1] - whole.prices[i][0] for i in unit))
        most = 0  # blocks that may go, none of them in vain
        here = top
        while over and most < len(cheap) - 1:
            there = emptied(whole, here, cheap[most])
            left = excess(whole, here)
            if not left or saved(whole, here, there, left) < whole.cost(here) - whole.cost(there):
                break
            here, most = there, most + 1
        price = (whole.cost(top) - whole.cost(emptied(whole, top, sum(units, ())))) / max(1, len(units))
        wanted = [round(depth * sum(over.values()) / price) if price else 0 for depth in self.depths]  # (1)
        for count in dict.fromkeys(min(n, most) for n in wanted):
            gone = set(sum(cheap[:count], ()))
            yield count, _alike(whole, gone)


def _blocks(space: Space) -> list[tuple[int, ...]]:
    """The sites of every block that can go: all of it."""
    blocks = sorted({site.block for site in space.sites})
    units = [tuple(i for i, site in enumerate(space.sites) if site.block == block) for block in blocks]
    return [unit for unit in units if all(space.ladders[i][0] == 0 < space.ladders[i][-1] for i in unit)]


def _alike(whole: Space, gone: set[int]) -> Allocation:
    """(2): one count for all sites that are alike, of which none can be raised by a rung while some sites are gone.

    It begins with the least that a uniform allocation gives any of them; then those rise that are furthest below all.
    The count of a site that is gone is that of the others like it.
    """
    kinds: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, (site, ladder) in enumerate(zip(whole.sites, whole.ladders, strict=True)):
        kinds.setdefault((site.kind, ladder), []).append(i)
    stay = tuple(ladder[:1] if i in gone else ladder for i, ladder in enumerate(whole.ladders))
    uniform = replace(whole, ladders=stay).uniform()
    rungs = {
        kind: kind[1].index(min((uniform[i] for i in of if i not in gone), default=kind[1][0]))
        for kind, of in kinds.items()
    }

    def plan(rungs: Mapping[tuple[str, tuple[int, ...]], int], empty: Set[int] = frozenset()) -> Allocation:
        counts = {i: kind[1][rung] for kind, rung in rungs.items() for i in kinds[kind]}
        return tuple(stay[i][0] if i in empty else counts[i] for i in range(len(whole.sites)))

    def fits(rungs: Mapping[tuple[str, tuple[int, ...]], int]) -> bool:
        return not excess(whole, plan(rungs, gone))

    while able := [kind for kind, r in rungs.items() if r + 1 < len(kind[1]) and fits({**rungs, kind: r + 1})]:
        rungs[min(able, key=lambda kind: (rungs[kind] / (len(kind[1]) - 1), kind))] += 1
    return plan(rungs)
