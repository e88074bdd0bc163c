"""Bi-level pruning: weights answer to the mask, and the mask is learned knowing that they will."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Effort, GateProblem, GateQuery, Learner, Lesson, Training, check_choices
from prunekit_strategies.learners.descent import Adam, SecondMoment

BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class BiP(Learner):
    """Alternate: weights go down under the mask on one batch, the mask's scores on another.

        min over m   ℓ(m∘θ*(m)),   θ*(m) = arg min over θ of ℓ'(m∘θ) + ½ γ ‖θ‖²                       (1)

    With g and g' the slopes of ℓ and ℓ' at m∘θ and no curvature, dθ*/dm = -diag(g') / γ, so that

        ∂ℓ/∂m + implicit term = θ∘g - m∘g∘g' / γ     summed over the weights of every group           (2)
        lower   θ ← a step of AdamW or SGD on ℓ', m held                                              (3)
        upper   s ← Adam(s, (2)),  m the set of largest Σ price · s within the budget                 (4)

    (2) is exact where ℓ' is linear in the weights, and off by O(1 / γ) where it is not. Where both levels have one loss
    and the lower one is solved, as by a refit, the implicit term is 0: hence two batches. In the end the set is that of
    the scores, or by `occupancy`: the share of steps, behind a first quarter, in which a group was kept.

    Source: BiP (arXiv 2210.04092) and its released code: SGD for weights at 0.1 or 0.01 and for scores at 0.1, 1 / γ =
    1e-4, scores that begin as weights, on image classifiers; there are no figures for language models. We differ: one
    score for a head or a neuron, begun as its Wanda-sp score beside the mean of its site; Adam for scores, with one
    second moment for all groups of a price; the exact budget over all sites; γ of 1, without which (2) is nothing. The
    weights of (2) are those that gates multiply, the columns behind them. In the released code the implicit term is a
    product of the scores' slope with itself on one batch, (θ∘g)² / γ; from the second step on one factor still has the
    whole slope of the step before in it, which is not set to zero.
    """

    steps: int = 128  # of both levels
    batch_tokens: int = 1024  # of either level in a step; whole windows, at least one
    rate: float = 1e-4  # of the weights, at the first step; it falls to 0 in half a cosine
    mask_rate: float = 0.03  # of Adam for scores
    gamma: float = 1.0  # γ
    optimizer: Literal["adamw", "sgd"] = "adamw"  # of the weights
    momentum: float = 0.9  # of SGD
    second_moment: SecondMoment = "shared"  # of scores: by the groups of one price, or each its own
    decide: Literal["occupancy", "score"] = "occupancy"  # of the last mask
    burn_in: float = 0.25  # share of the steps that occupancy leaves out

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.steps, self.batch_tokens) < 1:
            raise ValueError("steps and batch_tokens are at least 1")
        if not (min(self.rate, self.mask_rate, self.gamma) > 0 and 0 <= self.momentum < 1 and 0 <= self.burn_in < 1):
            raise ValueError("rates and gamma are above 0, 0 ≤ momentum < 1, 0 ≤ burn_in < 1")

    @property
    def training(self) -> Training:
        betas = (0.9, 0.95) if self.optimizer == "adamw" else (self.momentum, 0.0)
        return Training(optimizer=self.optimizer, betas=betas)

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        batch = seqlen * max(1, min(windows, self.batch_tokens // seqlen))
        return Effort(1 + 2 * self.steps, batch, 3 * self.steps * batch, taylor=True, steps=self.steps)

    def learn(self, problem: GateProblem) -> Lesson:
        price = problem.price
        first, *batches = problem.batches(1 + 2 * self.steps, self.batch_tokens)
        power = (yield GateQuery(torch.ones_like(price), first, frozenset({"power"}))).power
        assert power is not None
        score = torch.cat([part / max(float(part.mean()), 1e-30) for part in problem.knapsacks[-1].split(power)])
        adam, occupied = Adam(price, self.mask_rate, BETAS, self.second_moment), torch.zeros_like(price)
        for step in range(self.steps):
            lower, upper = batches[2 * step : 2 * step + 2]
            mask = problem.project(price * score.clamp_min(0)).double()
            if step >= self.burn_in * self.steps:
                occupied += mask
            rate = self.rate * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / self.steps).double())))
            yield GateQuery(mask, lower, rate=rate)  # (3)
            reply = yield GateQuery(mask, upper, frozenset({"gradient", "aligned"}), beside=lower)
            assert reply.gradient is not None
            assert reply.aligned is not None
            score = adam.step(score, hypergradient(reply.gradient, reply.aligned, self.gamma))  # (4)
        if self.decide == "score":
            return [problem.decision(problem.project(price * score.clamp_min(0)))]
        # on a tie of occupancy the score decides
        worth = occupied + torch.sigmoid(score)
        return [problem.decision(problem.project(price * worth))]


def hypergradient(slope: Float[Tensor, " groups"], aligned: Float[Tensor, " groups"], gamma: float) -> Tensor:
    """(2), of Σ θ∘g and Σ g∘g' over what the mask keeps of every group, which of a mask is m∘g∘g'."""
    return slope - aligned / gamma
