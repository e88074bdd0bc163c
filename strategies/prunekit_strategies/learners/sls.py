"""Layer-wise N:M: how many of every M weights each linear map keeps, learned while the weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Effort, GateProblem, GateQuery, Learner, Lesson, Training
from prunekit_strategies.learners.descent import Adam

MOST = 1.03  # of a score: head-room, so that one that fell does not take all that hang on it along at once
HALF = 0.5  # of p, above which a rank is kept


@dataclass(frozen=True)
class SLS(Learner):
    """A score for every rank of every map; a rank is kept while the product of its own and all before it is above ½.

        q_1 = 1,   p_i = Π_{j ≤ i} q_j,   0 ≤ q ≤ 1.03,   b_i = [p_i > ½]                            (1)
        W ∘ Σ_i b_i · [the weight is the i-th largest of its M]                                      (2)
        L = CE + λ Σ price · b / Σ price,   ∂b/∂p = 1                                                (3)
        λ ← 1.2 λ when in `patience` steps the price has not fallen by `stalled` of all              (4)

    Once the price is within the budget, the set of largest Σ price · p that spends it exactly is held, and weights go
    on to be trained under it. Scores above 1 could let p rise again above ½, and in the released code a rank is then
    kept without one before it; here p is the least so far, so that the ranks of a site are its first.

    Source: SLS (arXiv 2204.12266) and its released code: M 32, λ 1e-10 times the multiplications, checked every two of
    300 epochs, a rate of 1e-4, ranks sorted anew at every epoch, on super-resolution networks; there are no figures for
    language models. We differ: the scores have Adam and a rate of their own; (4) counts steps, for lessons of a few
    hundred; the last set spends the budget exactly, which the code crosses and then freezes; a rank is as many weights
    of a block as counts of the structure are apart. Which weights of a block stay in the end the pruner says:
    `magnitude` is the published choice.
    """

    misses: ClassVar[Mapping[str, str]] = {"flat": "a rank that is kept without a slope is not told from others"}

    structures: ClassVar[frozenset[str]] = frozenset({"n:m"})

    steps: int = 256
    batch_tokens: int = 1024  # per step; whole windows, at least one
    rate: float = 1e-4  # of AdamW for weights, at the first step; it falls to 0 in a line
    score_rate: float = 0.02  # of Adam for q
    penalty: float = 0.1  # λ at the start: nats per token for all prices
    growth: float = 1.2  # of λ
    patience: int = 4  # steps between two looks at the price
    stalled: float = 0.01  # of all prices

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_tokens, self.patience) < 1:
            raise ValueError("steps, batch_tokens and patience are at least 1")
        if not (self.rate >= 0 and self.score_rate > 0 and self.penalty > 0 and self.growth > 1 and self.stalled >= 0):
            raise ValueError("rate is at least 0, score_rate and penalty above 0, growth above 1, stalled at least 0")

    @property
    def training(self) -> Training | None:
        return Training() if self.rate else None

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        tokens = self.steps * seqlen * max(1, min(windows, self.batch_tokens // seqlen))
        return Effort(self.steps, back=tokens, steps=self.steps if self.rate else 0)

    def learn(self, problem: GateProblem) -> Lesson:
        price, knapsack = problem.price, problem.knapsacks[-1]
        share = price / price.sum()
        sizes, limits = knapsack.sizes, [limit for _, limit in problem.space.partitions]
        q, adam = torch.ones_like(price), Adam(price, self.score_rate, (0.9, 0.99), "shared")
        penalty, before, held = self.penalty, 1.0, None
        for step, windows in enumerate(problem.batches(self.steps, self.batch_tokens)):
            kept = held
            if kept is None:
                p = falling(products(q, sizes), sizes)  # (1)
                kept = p > HALF
                if float(price @ kept.double()) <= sum(limits):
                    held = kept = problem.project(price * p)
            mask = kept.double()
            rate = self.rate * (1 - step / self.steps)
            gradient = (yield GateQuery(mask, windows, frozenset({"gradient"}), rate=rate)).gradient
            assert gradient is not None
            if held is not None:
                continue
            leaf = q.clone().requires_grad_()
            (slope,) = torch.autograd.grad(products(leaf, sizes) @ (gradient + penalty * share), leaf)  # (3)
            q = fixed(adam.step(q, slope), sizes)
            if (step + 1) % self.patience == 0:
                now = float(share @ mask)
                penalty *= self.growth if before - now < self.stalled else 1.0  # (4)
                before = now
        p = falling(products(q, sizes), sizes)
        return [problem.decision(problem.project(price * p) if held is None else held)]


def products(q: Float[Tensor, " groups"], sizes: list[int]) -> Float[Tensor, " groups"]:
    """(1), site by site."""
    return torch.cat([part.cumprod(0) for part in q.split(sizes)])


def falling(p: Float[Tensor, " groups"], sizes: list[int]) -> Float[Tensor, " groups"]:
    """The least so far, site by site: no rank is above one before it."""
    return torch.cat([part.cummin(0).values for part in p.split(sizes)])


def fixed(q: Float[Tensor, " groups"], sizes: list[int]) -> Float[Tensor, " groups"]:
    """Scores within their bounds, the first of every site at 1."""
    return torch.cat([torch.cat([torch.ones_like(part[:1]), part[1:].clamp(0, MOST)]) for part in q.split(sizes)])
