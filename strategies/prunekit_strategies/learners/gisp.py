"""Global iterated pruning: a little goes at every step, by an importance that is measured anew under what is gone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunekit import Effort, GateProblem, GateQuery, Learner, Lesson

GONE = 1e-9  # of its importance is left to a group that was removed
ROUNDING = 1e-9  # of a share of all that goes


@dataclass(frozen=True)
class GISP(Learner):
    """Lower the limit in equal steps from the dense price to the budget, each time to the most important set that fits.

        I_u = Σ_{w of u} |w ∂loss/∂w|                                (1)   on `tokens` tokens, under the present mask
        m ← the set of largest Σ I within m and the limit            (2)

    Sets are nested, so that one conversation serves every budget of a family: whenever the limit passes one, its mask
    is that step's. A removal frees the price of the dearest group at least, or (2) could never let it go: where that is
    more than an equal step, removals are fewer, and I is the mean over the steps since the last one.

    Source: GISP (arXiv 2510.18030), with (1) as in its Algorithm 1, on text: first-order importance of the language
    modelling loss, summed over the structure, one order over all layers, about 110 steps for a model of seven billion
    parameters, on 2000 windows of 256 tokens. Equal numbers are removed there at every step; here equal prices, and (2)
    is the exact knapsack, so that a head is worth its price in neurons. The paper ranks by importance per weight; in
    (2) the price is the weight of a group, so that the order is the same and only the boundary differs. The code
    divides what a neuron sums up by 3 d_ff and not by its 3 d weights, so that neurons go before heads, and of grouped
    heads it scores queries and outputs alone. Its margin between right and wrong answers, and its sparing of the first
    and last blocks, are not here.
    """

    nests: ClassVar[bool] = True

    steps: int = 32  # from dense to the smallest budget
    tokens: int = 16_384  # to measure (1) on at every step; whole windows, other ones in turn

    def __post_init__(self) -> None:
        if min(self.steps, self.tokens) < 1:
            raise ValueError("steps and tokens are at least 1")

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        steps = self.steps + budgets - 1
        return Effort(steps, back=steps * seqlen * max(1, min(windows, self.tokens // seqlen)), taylor=True)

    def learn(self, problem: GateProblem) -> Lesson:
        larger = mask = torch.ones(problem.groups, dtype=torch.bool)  # larger: what the budget before keeps
        last = torch.zeros_like(problem.price)  # importance of every group when it was last there
        removals, told = self._removals(problem), list[Tensor]()
        decisions, done = [], 0.0
        limits = [space.budget.limit for space in problem.spaces]
        full = sum(problem.knapsacks[-1].full)
        removed = [(full - limit) / max(1, full - limits[-1]) for limit in limits]  # shares of all that goes
        plan = [(step / self.steps, -1) for step in range(1, self.steps)] + [(p, i) for i, p in enumerate(removed)]
        for (progress, budget), windows in zip(sorted(plan), problem.batches(len(plan), self.tokens), strict=True):
            importance = (yield GateQuery(mask.double(), windows, frozenset({"taylor"}))).taylor  # (1)
            assert importance is not None
            told.append(importance)
            last = torch.where(mask, torch.stack(told).mean(0), last)
            if budget < 0:
                gone = math.floor(progress * removals + ROUNDING) / removals
                if gone <= done:
                    continue
                mask, done = problem.project(last, among=mask, progress=gone), gone  # (2)
            else:
                # what is gone is worth next to nothing, and only fills what would stay unspent
                mask = larger = problem.project(torch.where(mask, last, GONE * last), among=larger, budget=budget)
                decisions.append(problem.decision(mask))
            told.clear()
        return decisions

    def _removals(self, problem: GateProblem) -> int:
        """How many equal parts of all that goes are no cheaper than the dearest group."""
        knapsack = problem.knapsacks[-1]
        parts = [self.steps]
        for (members, limit), full in zip(knapsack.space.partitions, knapsack.full, strict=True):
            dearest = float(knapsack.price[torch.isin(knapsack.site, torch.tensor(members))].max())
            if full > limit and dearest > 0:
                parts.append(int((full - limit) / dearest))
        return max(1, min(parts))
