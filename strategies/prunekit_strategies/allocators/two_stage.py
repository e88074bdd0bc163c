"""2SSP: the same narrower width for all MLPs, and whole attention sub-layers removed one by one."""

from dataclasses import dataclass, replace

from prunekit import Allocator, Problem, Query, Search, Space
from prunekit_strategies.allocators.competing import best_of
from prunekit_strategies.allocators.removals import emptied, excess, saved


@dataclass(frozen=True)
class TwoStage(Allocator):
    """Attention sub-layers go where they are missed least; the MLPs share what is left to remove.

    With L attention sub-layers, the share s that is removed, and the prices of an MLP and of an attention sub-layer:

        N = round(L s^(price(MLP) / price(attention) / alpha))                              (1)

    sub-layers of attention go, each time the one whose removal has the least loss, on MLPs that are narrowed already.
    All MLPs keep the same share, so that the budget is spent exactly. Where no width of the MLPs meets the budget with
    N, the nearest number is taken with which one does; where the budget is met with fewer, fewer go.

    Source: 2SSP (Sandri et al., arXiv:2501.17771), eq. 5, alpha 1.5; perplexity of one window of 2048 tokens. There
    a width is rounded, so that the share that is released is near what was asked. Ours: the start competes, so that
    the answer is never worse than it on the objective; `compete: false` is the paper's.
    """

    alpha: float = 1.5  # of (1)
    removed: int | None = None  # attention sub-layers that go, N; None: (1)
    tokens: int | None = None  # to judge a removal on; None: all
    compete: bool = True  # let the start win where the objective prefers it

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha is above 0, not {self.alpha}")
        if min(self.tokens or 1, 1 if self.removed is None else self.removed + 1) < 1 or self.tokens == 0:
            raise ValueError(f"tokens is at least 1 and removed at least 0, not {self.tokens} and {self.removed}")

    def first_space(self, whole: Space) -> Space:
        """Attention whole or gone, every MLP at its width."""
        attention = sorted(_open(whole), key=lambda i: -whole.prices[i][-1])  # the dearest may all stay
        asked = self.count(whole) if self.removed is None else self.removed
        narrowed = whole
        for n in sorted(range(len(attention) + 1), key=lambda n: (abs(n - asked), n)):
            stays = attention[: len(attention) - n]
            fixed = {i: (whole.ladders[i][-1 if i in stays else 0],) for i in attention}
            narrowed = replace(whole, ladders=tuple(fixed.get(i, ladder) for i, ladder in enumerate(whole.ladders)))
            if not excess(narrowed, tuple(ladder[0] for ladder in narrowed.ladders)):
                break
        both = {i: tuple(sorted({whole.ladders[i][0], whole.ladders[i][-1]})) for i in attention}
        return replace(
            whole, ladders=tuple(both.get(i, (width,)) for i, width in enumerate(narrowed.uniform())), stride=1.0
        )

    def count(self, whole: Space) -> int:
        """N of (1)."""
        attention = _open(whole)
        others = [i for i in range(len(whole.sites)) if whole.sites[i].kind != "attention"]
        if not attention or not others:
            return 0
        ratio = _mean(whole, others) / max(_mean(whole, attention), 1e-300)
        budget = whole.budget
        share = 1 - (budget.limit + budget.outside) / budget.dense if budget.dense else 0.0
        return round(len(attention) * max(share, 0.0) ** (ratio / self.alpha))  # (1)

    def search(self, problem: Problem) -> Search:
        space = problem.space
        attention = _open(space)
        here = tuple(space.ladders[i][-1] if i in attention else kept for i, kept in enumerate(problem.start))
        while over := excess(space, here):
            ways = [emptied(space, here, [i]) for i in attention]
            able = [there for there in dict.fromkeys(ways) if saved(space, here, there, over)]
            losses = yield [Query(there, self.tokens, probe=True) for there in able]
            here = min(zip(losses, able, strict=True))[1]
        answers = list(dict.fromkeys([here, problem.start] if self.compete else [here]))
        losses = yield [Query(a) for a in answers]
        return best_of(type(self).__name__, problem, answers, losses)


def _open(space: Space) -> list[int]:
    """Attention sub-layers that may go."""
    return [i for i, s in enumerate(space.sites) if s.kind == "attention" and len(space.ladders[i]) > 1]


def _mean(space: Space, sites: list[int]) -> float:
    return sum(space.budget.price(space.sites[i], space.sites[i].n_groups) for i in sites) / len(sites)
