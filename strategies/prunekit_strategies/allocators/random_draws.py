"""Random allocations of one price: the baseline of every search."""

import random
from dataclasses import dataclass

from prunekit import Allocator, Problem, Query, Search
from prunekit_strategies.allocators.probes import judged_again


@dataclass(frozen=True)
class RandomDraws(Allocator):
    """Draw relaxed targets, round each to the allocation that spends the budget, judge, keep the best.

        target_i = c_i + reach n_i u,   u ~ Uniform(-1, 1)                                       (1)

    with the start c and n_i groups. With reach 1 a target may be anything, so every tight allocation has its chance; a
    smaller reach stays near the start. What is drawn again is not asked again. The best few and the start are judged
    once more, on all tokens.
    """

    draws: int = 200  # allocations to ask for
    tokens: int = 8_192  # to judge a draw on
    finalists: int = 4  # draws judged again on all tokens
    reach: float = 1.0  # largest deviation of a target, share of a site's groups
    compete: bool = True  # whether the start takes part, or a draw is the answer however it is judged

    def __post_init__(self) -> None:
        if min(self.draws, self.tokens, self.finalists) < 1 or not 0 < self.reach <= 1:
            raise ValueError("draws, tokens and finalists are at least 1, reach is in 0..1")

    def search(self, problem: Problem) -> Search:
        rng, space, start = random.Random(problem.seed), problem.space, problem.start
        drawn = {start: None}  # an ordered set
        for _ in range(4 * self.draws):
            if len(drawn) > self.draws:
                break
            target = [k + self.reach * s.n_groups * rng.uniform(-1, 1) for k, s in zip(start, space.sites, strict=True)]
            drawn[space.nearest(target)] = None  # (1)
        if not self.compete and len(drawn) > 1:  # there may be a single tight allocation, the start
            drawn.pop(start)
        losses = yield [Query(a, min(self.tokens, problem.tokens) or None) for a in drawn]
        ranked = [a for _, a in sorted(zip(losses, drawn, strict=True))]
        if not self.compete:
            return ranked[0]
        return (yield from judged_again(ranked[: self.finalists], problem))
