"""Judge an allocation by the data set it serves worst, or nearly so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp, fsum, inf, isfinite, log
from typing import Literal

import prunekit as pk
from prunekit_objectives.divergence import Divergence


@dataclass(frozen=True)
class Robust(pk.Objective):
    """The loss under the worst weights of several data sets, not too far from their own.

    Data set d of share p_d has the excess x_d = ℓ_d - r_d, its inner loss above the dense model's. With q over them:

        soft    max_q  q·x - T KL(q‖p)  =  T log Σ_d p_d exp(x_d / T)           (1)
        ball    max_q  q·x  with  KL(q‖p) ≤ radius                              (2)
        max     max_d  x_d                                                      (3)

    Both maxima are at q_d ∝ p_d exp(x_d / T), in (2) with the T that meets the radius. (1) goes from (3) at T → 0 to
    the mean p·x at T → ∞, (2) from the mean at radius 0 to (3).

    Source: the aggregation of DRPruning (arXiv 2411.14055), which adapts q step by step while it trains. Nothing is
    trained here, so the weights of each allocation are solved for. We take the value (1), not Σ_d q_d x_d with its
    weights: that can fall where some x_d rises.
    """

    inner: pk.Objective = field(default_factory=Divergence)
    rule: Literal["soft", "ball", "max"] = "soft"
    temperature: float = 0.1  # T of (1), in units of the inner loss
    radius: float = 0.1  # of (2), in nats
    reference: bool = True  # False: x_d = ℓ_d, so that what is hard for the dense model too weighs more

    def __post_init__(self) -> None:
        pk.check_choices(self)
        if not self.temperature > 0 or not self.radius >= 0:
            raise ValueError(f"temperature is more than 0 and radius not below, not {self.temperature}, {self.radius}")
        if self.inner.training(1 << 40):
            raise ValueError(
                f"{type(self.inner).__name__} trains a model for every data set; let it wrap robust instead"
            )
        if not self.inner.reads(1).tokens:
            raise ValueError(f"{type(self.inner).__name__} reads no tokens, so it is the same for every data set")

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        shares, excess = list[float](), list[float]()
        for part in batch.parts.values():
            shares.append(part.n_tokens / batch.n_tokens)
            dense = net.dense_loss(self.inner, part) if self.reference else 0.0
            excess.append(self.inner.loss(net, allocation, part) - dense)
        if not all(map(isfinite, excess)):
            return inf
        if self.rule == "soft":
            return soft(shares, excess, self.temperature)
        return max(excess) if self.rule == "max" else ball(shares, excess, self.radius)  # (3)

    def check(self, batch: pk.TokenBatch) -> None:
        if len(batch.parts) < 2:
            raise pk.WrongInput(
                f"the objective robust weighs data sets against each other, and there is only {batch.source}; "
                "give several: --dataset one.txt --dataset two.txt"
            )
        for part in batch.parts.values():
            self.inner.check(part)

    def reads(self, depth: int) -> pk.Reads:
        return replace(self.inner.reads(depth), whole=False, by_source=True)


def soft(p: Sequence[float], x: Sequence[float], temperature: float) -> float:
    """(1): T log Σ_d p_d exp(x_d / T)."""
    most = max(x)
    return most + temperature * log(fsum(s * exp((v - most) / temperature) for s, v in zip(p, x, strict=True)))


def ball(p: Sequence[float], x: Sequence[float], radius: float) -> float:
    """(2), by bisection: the divergence of the worst weights rises with η = 1 / T."""
    most, spread = max(x), max(x) - min(x)
    if spread == 0 or radius >= -log(fsum(s for s, v in zip(p, x, strict=True) if v == most)):
        return most

    def worst(eta: float) -> tuple[float, float]:
        """(q·x, KL(q‖p)) at η."""
        raw = [s * exp(eta * (v - most)) for s, v in zip(p, x, strict=True)]
        value = fsum(w * v for w, v in zip(raw, x, strict=True)) / fsum(raw)
        return value, eta * (value - most) - log(fsum(raw))

    low, high = 0.0, 1.0 / spread
    while worst(high)[1] < radius and high < 1e6 / spread:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if worst(middle)[1] < radius else (low, middle)
    return worst(low)[0]
