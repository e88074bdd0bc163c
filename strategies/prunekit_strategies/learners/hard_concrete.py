"""Gates drawn from a stretched, clipped concrete distribution, under an augmented Lagrangian of their price."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import (
    Effort,
    GateProblem,
    GateQuery,
    Learner,
    Lesson,
    TokenBatch,
    Training,
    WrongInput,
    check_choices,
)
from prunekit.plugins.learner import Want
from prunekit_strategies.learners.descent import Adam, SecondMoment
from prunekit_strategies.learners.domains import Draws

LOW, HIGH = -0.1, 1.1  # l and r
BETA = 2 / 3  # β, of the concrete distribution
SHARP = 0.8  # of the gate without chance
FIRST, SPREAD = 5.0, 0.01  # log α at the start: mean and standard deviation
REACH = math.log(100)  # of log α from 0
BETAS = (0.9, 0.95)
EDGE = 1e-6  # of a uniform draw beside 0 and 1


class Loading(Protocol):
    """What share of the text every data set gets."""

    weights: list[float]

    def heard(self, losses: list[float], progress: float, kept: float) -> None:
        """Losses of every data set at a share of all steps, of a model of which this share is expected to be kept."""
        ...


@dataclass(frozen=True)
class HardConcrete(Learner):
    """Draw every gate, learn what it is drawn from, and train the weights with it.

        z = clip(σ((log u - log(1 - u) + log α) / β) (r - l) + l, 0, 1),   u ~ U(0, 1)               (1)
        P(z > 0) = σ(log α - β log(-l / r))                                                          (2)
        s = 1 - Σ share P(z > 0)                            what is expected to go, as a share of all prices
        L = CE + λ₁ (s - t) + λ₂ (s - t)²,   λ by ascent, t up to the target in a line over `ramp`   (3)

    One question a step: weights go down in CE as log α goes down in L, on the same windows under the same gates. In
    the end the set of largest Σ price · v within the budget,

        v = σ(0.8 log α / β)                                                                         (4)

    whose gates keep the value v, which becomes part of the weights. Learners of this kind have these options.
    """

    stochastic: ClassVar[bool] = True
    misses: ClassVar[Mapping[str, str]] = dict.fromkeys(("linear", "flat", "pairs"), "a lesson is of few draws")

    steps: int = 256
    batch_tokens: int = 1024  # per step; whole windows, at least one
    rate: float = 1e-4  # of AdamW for weights, at its height; 0: they stay
    mask_rate: float = 0.1  # of Adam for log α
    multiplier_rate: float = 1.0  # of Adam for λ
    ramp: float = 0.2  # share of the steps in which the target rises
    warmup: float = 0.1  # share of the steps in which the rate of weights rises; then it falls to a tenth as a cosine
    second_moment: SecondMoment = "own"  # of log α: by the groups of one price, or each its own
    interval: float = 1 / 64  # share of the steps after which data sets are weighed anew
    reference_tokens: int = 8192  # on which the dense model says what data sets are compared with

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.steps, self.batch_tokens, self.reference_tokens) < 1:
            raise ValueError("steps, batch_tokens and reference_tokens are at least 1")
        if not (self.rate >= 0 and min(self.mask_rate, self.multiplier_rate) > 0):
            raise ValueError("rate is at least 0, mask_rate and multiplier_rate are above 0")
        if not (0 <= self.ramp <= 1 and 0 <= self.warmup < 1 and 0 < self.interval <= 1):
            raise ValueError("0 ≤ ramp ≤ 1, 0 ≤ warmup < 1, 0 < interval ≤ 1")

    def check(self, batch: TokenBatch) -> None:
        super().check(batch)
        if self.weighs and not batch.origins:
            raise WrongInput(
                f"{type(self).__name__} weighs data sets, and all text is of {batch.source}; give several in "
                f"data.search_dataset, or {self.unweighed}"
            )

    @property
    @abstractmethod
    def unweighed(self) -> str:
        """What does the same on one data set, for a message."""

    @property
    @abstractmethod
    def weighs(self) -> bool:
        """Whether data sets are weighed; else every window has its turn."""

    @abstractmethod
    def weighing(self, reference: list[float], kept: float) -> Loading:
        """How data sets are weighed, whose dense losses are the `reference`, where that share of the model is kept."""

    @property
    def training(self) -> Training | None:
        return Training(betas=BETAS) if self.rate else None

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        tokens = self.steps * seqlen * max(1, min(windows, self.batch_tokens // seqlen))
        first = seqlen * max(1, min(windows, self.reference_tokens // seqlen)) if self.weighs else 0
        return Effort(self.steps + self.weighs, forward=first, back=tokens, steps=self.steps if self.rate else 0)

    def learn(self, problem: GateProblem) -> Lesson:
        rng = torch.Generator().manual_seed(problem.seed)
        price = problem.price
        share = price / price.sum()
        target = 1 - float(share @ problem.euclid(torch.full_like(price, 0.5)))
        log_alpha = FIRST + SPREAD * torch.randn(len(price), generator=rng, dtype=torch.float64)
        down = Adam(price, self.mask_rate, BETAS, self.second_moment)
        up = Adam(torch.zeros(2).double(), self.multiplier_rate, BETAS, "own")
        multipliers = torch.zeros(2, dtype=torch.float64)  # λ
        loading, draws = None, Draws(problem, rng)
        if self.weighs:
            windows = draws.even(problem.batch(self.reference_tokens))
            losses = (yield GateQuery(torch.ones_like(price), windows, frozenset({"windows"}))).windows
            assert losses is not None
            loading = self.weighing(draws.means(windows, losses), 1 - target)
        every, batches = max(1, round(self.interval * self.steps)), problem.batches(self.steps, self.batch_tokens)
        want: frozenset[Want] = frozenset({"gradient", "windows"} if self.weighs else {"gradient"})
        for step, windows in enumerate(batches):
            if loading is not None:
                if step and step % every == 0:
                    loading.heard(draws.lost, step / self.steps, float(share @ opens(log_alpha)))
                windows = draws.draw(loading.weights, len(windows))  # noqa: PLW2901  of as many
            u = torch.rand(len(price), generator=rng, dtype=torch.float64).clamp(EDGE, 1 - EDGE)
            leaf = log_alpha.clone().requires_grad_()
            z = drawn(leaf, u)  # (1)
            rate = self.rate * height((step + 0.5) / self.steps, self.warmup)
            reply = yield GateQuery(z.detach(), windows, want, rate=rate)
            assert reply.gradient is not None
            if reply.windows is not None:
                draws.heard(windows, reply.windows)
            over = 1 - share @ opens(leaf) - target * min(1.0, (step + 1) / max(1.0, self.ramp * self.steps))  # s - t
            terms = torch.stack([over, over.square()])
            (slope,) = torch.autograd.grad(z @ reply.gradient + multipliers @ terms, leaf)  # (3)
            log_alpha = down.step(log_alpha, slope).clamp(-REACH, REACH)
            multipliers = up.step(multipliers, -terms.detach())
        v = gate(log_alpha)
        decision = problem.decision(problem.project(price * v), v)
        return [decision if loading is None else replace(decision, domains=tuple(loading.weights))]


def drawn(log_alpha: Float[Tensor, " groups"], u: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    """(1)."""
    return (torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / BETA) * (HIGH - LOW) + LOW).clamp(0, 1)


def opens(log_alpha: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    """(2)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def gate(log_alpha: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    """(4)."""
    return torch.sigmoid(SHARP * log_alpha / BETA)


def height(share: float, warmup: float) -> float:
    """Of the rate of weights at a share of all steps: up in a line, then down to a tenth in half a cosine."""
    if share < warmup:
        return share / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))
