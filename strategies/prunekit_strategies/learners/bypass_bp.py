"""Bypass back-propagation: every group is kept with a probability that learns from losses of drawn masks alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Effort, GateProblem, GateQuery, Learner, Lesson

CLIP = 1e-3  # of a probability beside 0 and 1, in a step


@dataclass(frozen=True)
class BypassBP(Learner):
    """Draw masks, let what they lose say which groups should be kept more often; forward passes only.

        p ← the nearest p to share + spread · z in Σ price Δp², of expected price as in (4)      (1)
        m^k ~ Bernoulli(p),   ℓ_k the loss of mask k,   k = 1 … K                                (2)
        p ← p - rate_t/K Σ_k (ℓ_k - mean of the others) (m^k - p) / √(p (1 - p))                 (3)
        p ← the nearest p in [0, 1] whose expected price is the budget                           (4)

    with z the power of groups, a z-score in every site. In the end the set of largest Σ price · p within the budget.
    (1) shifts all groups alike; in (4), without weights, a group is shifted as far as it is dear, so that (3) ends
    where what groups are worth is in the ratio of their prices. (3) is the gradient of E ℓ times √(p (1 - p)), the
    score of a Bernoulli variable in its variance-stabilising scale; the other draws for a baseline keep it unbiased.
    The rate falls as a cosine.

    Source: Bypass Back-propagation (Gao et al., arXiv 2406.10576) and its released code: two draws, a rate of 2e-3, 120
    thousand windows of 128 tokens in batches of eight. We differ: the code's baseline is a moving mean that holds the
    present draws, divided by K - 1, which scales the step by 1.8 at its settings; its projection lowers probabilities
    and never raises them, per kind; a penalty that pushes probabilities apart is off in its scripts; it begins with
    share + σ(z) less the mean, whose slope at the mean is the `spread` here. A step of (3) is nearly all noise, a
    random walk whose drift is what groups are worth: `rate` is such that in `steps` the walk, rate √steps, is as long
    as in the code's 15 thousand steps. Here one budget, in prices, is for heads and neurons together (`apart` in a
    recipe parts them), and the prior of (1) is the Wanda-sp score of groups in the dense model.
    """

    stochastic: ClassVar[bool] = True
    misses: ClassVar[Mapping[str, str]] = dict.fromkeys(("linear", "flat", "pairs"), "a lesson is of few draws")

    steps: int = 1024
    draws: int = 2  # K
    batch_tokens: int = 1024  # per draw; whole windows, the same for all draws of a step
    rate: float = 0.0075  # of the first step
    spread: float = 0.25  # of the first probabilities, standard deviation in a site

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_tokens) < 1 or self.draws < 2:
            raise ValueError("steps and batch_tokens are at least 1, draws at least 2: one is the other's baseline")
        if not (self.rate > 0 and self.spread >= 0):
            raise ValueError("rate is above 0, spread at least 0")

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        batch = max(1, min(windows, self.batch_tokens // seqlen))
        return Effort(1 + self.steps * self.draws, forward=seqlen * (batch + self.steps * self.draws * batch))

    def learn(self, problem: GateProblem) -> Lesson:
        rng = torch.Generator().manual_seed(problem.seed)
        first, *batches = problem.batches(1 + self.steps, self.batch_tokens)
        power = (yield GateQuery(torch.ones_like(problem.price), first, want=frozenset({"power"}))).power
        assert power is not None
        even = problem.euclid(torch.full_like(power, 0.5), problem.price)
        p = problem.euclid(even + self.spread * standardised(problem, power), problem.price)  # (1)
        for step, windows in enumerate(batches):
            masks = [torch.bernoulli(p, generator=rng) for _ in range(self.draws)]
            losses = []
            for mask in masks:
                losses.append((yield GateQuery(mask, windows)).loss)
            rate = self.rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            p = problem.euclid(p - rate * gradient(p, masks, losses))  # (3), (4)
        return [problem.decision(problem.project(problem.price * p))]


def gradient(p: Float[Tensor, " groups"], masks: list[Tensor], losses: list[float]) -> Float[Tensor, " groups"]:
    """(3): what draws say of ∂E[loss]/∂p · √(p (1 - p)). What failed counts as the worst that did not."""
    known = [loss for loss in losses if math.isfinite(loss)]
    values = [loss if math.isfinite(loss) else max(known, default=0.0) for loss in losses]
    mean, k = math.fsum(values) / len(values), len(values)
    inside = p.clamp(CLIP, 1 - CLIP)
    scale = (inside * (1 - inside)).sqrt()
    slope = torch.zeros_like(p)
    for mask, value in zip(masks, values, strict=True):
        # same as: less the mean of the others, over k
        slope += (value - mean) / (k - 1) * (mask - p) / scale
    return slope


def standardised(problem: GateProblem, value: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    """Mean 0 and variance 1 in every site; 0 where all are alike."""
    parts = []
    for part in problem.knapsacks[-1].split(value):
        deviation = part.std(unbiased=False)
        parts.append((part - part.mean()) / deviation if float(deviation) > 0 else torch.zeros_like(part))
    return torch.cat(parts)
