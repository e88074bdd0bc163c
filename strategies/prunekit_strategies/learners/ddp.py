"""Deterministic differentiable pruning: gates that are their own parameters, and a price that learns to be met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Effort, GateProblem, GateQuery, Learner, Lesson
from prunekit_strategies.learners.descent import Adam

LOW, HIGH = -0.1, 1.1  # a sigmoid is stretched to, so that it reaches 0 and 1
STEEP = 2.3978952727983707  # ln 11: then s is 0 at z = 0 and 1 at z = 2μ
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class DDP(Learner):
    """Descend on the gates themselves, relu(z), under an augmented Lagrangian of their smoothed price.

        s(z) = clamp(σ(ln 11 (relu(z) - μ_t)/μ_t) · 1.2 - 0.1, 0, 1)                                  (1)
        μ_t  = 0.5 - (0.5 - μ) √(t/T)                                                                  (2)
        L    = CE + divergence · KL + λ₁ (s̄ - ρ) + λ₂ (s̄ - ρ)² + λ₃ mean s (1 - s)                    (3)

    with s̄ the price of s and ρ the budget, as shares of all that gates can cost; gates go down in L, multipliers up.
    Slopes pass relu and clamp as if they were not there, so that a group that is closed can come back. In the end the
    set of largest Σ price · relu(z) within the budget; relu(z) are its scales, which count where the pruner leaves the
    weights as they are.

    Source: DDP (arXiv 2603.08065) and its released code: Adam at 2e-2 (4e-1 for λ₂), z ~ N(1, 0.01), μ 0.05 in the
    paper and 0.1 in the code, divergence 2, 1000 steps of 16 windows of 2048 tokens. We differ: one budget in prices
    for heads and neurons (the code has one for each kind, and whole heads rounded), ln 11 for its 2.4, the gate of a
    head at the output projection, where the exact set that is exported is also the one that is evaluated.
    """

    stochastic: ClassVar[bool] = True
    misses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("linear", "pairs"), "Adam hears of slopes of one size their sign alone"
    )

    steps: int = 512
    batch_tokens: int = 1024  # per step; whole windows, at least one
    rate: float = 0.02  # of Adam, for gates, λ₁ and λ₃
    penalty_rate: float = 0.4  # for λ₂
    divergence: float = 2.0  # weight of the divergence from the dense model
    narrow: float = 0.05  # μ in the end

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_tokens) < 1:
            raise ValueError("steps and batch_tokens are at least 1")
        if not (min(self.rate, self.penalty_rate) > 0 and self.divergence >= 0 and 0 < self.narrow <= 0.5):
            raise ValueError("rates are above 0, divergence at least 0, 0 < narrow ≤ 0.5")

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        tokens = self.steps * seqlen * max(1, min(windows, self.batch_tokens // seqlen))
        return Effort(self.steps, back=tokens, dense=tokens if self.divergence else 0)

    def learn(self, problem: GateProblem) -> Lesson:
        price = problem.price
        share = price / price.sum()
        target = float(share @ problem.euclid(torch.full_like(price, 0.5)))
        rng = torch.Generator().manual_seed(problem.seed)
        z = 1 + 0.01 * torch.randn(len(price), generator=rng, dtype=torch.float64)
        down = Adam(price, self.rate, BETAS, "own")
        up = [Adam(torch.zeros(1).double(), rate, BETAS, "own") for rate in (self.rate, self.penalty_rate, self.rate)]
        multipliers = torch.zeros(3, dtype=torch.float64)  # λ
        for step, windows in enumerate(problem.batches(self.steps, self.batch_tokens)):
            width = 0.5 - (0.5 - self.narrow) * (step / self.steps) ** 0.5  # (2)
            query = GateQuery(z.clamp_min(0), windows, frozenset({"gradient"}), dense=self.divergence)
            gradient = (yield query).gradient
            assert gradient is not None
            terms, slope = lagrangian(z, multipliers, share, target, width)
            z = down.step(z, gradient + slope)
            multipliers = torch.cat([adam.step(multipliers[i : i + 1], -terms[i : i + 1]) for i, adam in enumerate(up)])
        scales = z.clamp_min(0)
        return [problem.decision(problem.project(price * scales), scales)]


def smoothed(z: Float[Tensor, " groups"], width: float) -> Float[Tensor, " groups"]:
    """(1); its slope is that of the sigmoid, also where relu and clamp are flat."""
    gate = z + (z.clamp_min(0) - z).detach()
    s = torch.sigmoid(STEEP * (gate - width) / width) * (HIGH - LOW) + LOW
    return s + (s.clamp(0, 1) - s).detach()


def lagrangian(
    z: Float[Tensor, " groups"],
    multipliers: Float[Tensor, " 3"],
    share: Float[Tensor, " groups"],
    target: float,
    width: float,
) -> tuple[Float[Tensor, " 3"], Float[Tensor, " groups"]]:
    """(the terms of (3) that multipliers weigh, the slope of their weighted sum at z)."""
    leaf = z.detach().requires_grad_()
    s = smoothed(leaf, width)
    over = share @ s - target
    terms = torch.stack([over, over.square(), (s * (1 - s)).mean()])
    (slope,) = torch.autograd.grad(multipliers @ terms, leaf)
    return terms.detach(), slope
