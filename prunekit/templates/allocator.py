"""An allocator for prunekit: how much every site keeps, as questions and an answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Allocator):
    """Climb: move a little of the budget from one site to another, and stay where the loss is lower.

    In every round some neighbours of the best allocation so far are drawn and asked about, all on the same tokens.
    Source: write here the paper, and where the code differs from it.
    """

    rounds: int = 10
    neighbours: int = 8  # drawn in a round

    def search(self, problem: pk.Problem) -> pk.Search:
        """Yield questions, receive their losses, return the answer: your search goes here."""
        rng = random.Random(problem.seed)  # the only source of randomness
        here = problem.start
        (best,) = yield [pk.Query(here)]
        for _ in range(self.rounds):
            there = list(problem.space.swaps(here))  # all within the budget
            drawn = rng.sample(there, min(self.neighbours, len(there)))
            if not drawn:
                break
            losses = yield [pk.Query(allocation) for allocation in drawn]
            if min(losses) < best:
                best, here = min(zip(losses, drawn, strict=True))
        return here
