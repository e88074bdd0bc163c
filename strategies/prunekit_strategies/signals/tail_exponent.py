"""Tail exponent: how heavy the tail of a weight's spectrum is. AlphaPruning's number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import LayerProblem, Signal

NO_TAIL = 100.0  # the exponent where a spectrum has no tail, or too short a one to tell; no tail is lighter


@dataclass(frozen=True)
class TailExponent(Signal):
    """Mean tail exponent α of the spectra of a site's linear maps; a trained layer has a heavy tail, a small α.

    With the eigenvalues λ_1 ≤ … ≤ λ_n of WᵀW above 0 and a tail that begins at λ_k, m = n - k + 1 of them:

        α_k = 1 + m / Σ_{i ≥ k} ln(λ_i / λ_k)                       Hill's estimate            (1)
        D_k = max_{i ≥ k} |F_k(λ_i) - F̂_k(λ_i)|                     Kolmogorov-Smirnov         (2)

    with F_k(λ) = 1 - (λ/λ_k)^(1-α_k) and the empirical F̂_k, both sides of its steps. The answer is α_k of the least
    D_k, among the λ_k from 0.95 times the lower to 1.5 times the upper end of the fullest bin of a histogram of log λ.

    Source: AlphaPruning (Lu et al. 2024, arXiv 2410.10912); (1) Hill 1975, (2) as in Clauset et al. 2009. The
    published code compares the logarithm of the window's lower end with λ itself, so that it has no lower end, takes
    1.5 times the lower end of the bin for the upper one, and takes (2) at one side of the steps; here all three are as
    they should be, and a histogram has at most n/4 bins, which is less than its 100 below 400 eigenvalues. The maps are
    the one that is cut and those in front of it (query, key and value; gate and up).
    """

    unitless: ClassVar[bool] = True
    bins: int = 100  # of the histogram, at most

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"a histogram has at least one bin, not {self.bins}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"producers"})

    def measure(self, layer: LayerProblem) -> float:
        weights = [layer.weight, *(producer.weight for producer in layer.producers)]
        return sum(tail_exponent(spectrum(weight), self.bins) for weight in weights) / len(weights)


def spectrum(weight: Float[Tensor, "m n"]) -> Float[Tensor, " rank"]:
    """Eigenvalues of WᵀW that are not rounding, ascending, in float64."""
    w = weight.double()
    values = torch.linalg.eigvalsh(w.T @ w if w.shape[1] <= w.shape[0] else w @ w.T)
    return values[values > len(values) * torch.finfo(values.dtype).eps * values.abs().amax()]


def tail_exponent(values: Float[Tensor, " n"], bins: int = 100) -> float:
    """α by (1) and (2) of positive ascending eigenvalues; NO_TAIL where all are equal or fewer than two."""
    n = len(values)
    if n < 2 or bool(values[-1] == values[0]):
        return NO_TAIL
    logs = values.log()
    low, high = _fullest(logs, min(bins, max(1, n // 4)))
    inside = (logs >= low + math.log(0.95)) & (logs <= high + math.log(1.5))
    best, alpha = math.inf, NO_TAIL
    for k in inside[:-1].nonzero().flatten().tolist():
        tail = logs[k:] - logs[k]  # ln(λ_i / λ_k)
        m, total = n - k, float(tail.sum())
        if total <= 0:
            continue
        exponent = 1 + m / total  # (1)
        fitted = 1 - torch.exp((1 - exponent) * tail)
        steps = torch.arange(m + 1, dtype=torch.float64, device=values.device) / m
        distance = float(torch.maximum((fitted - steps[:-1]).abs(), (fitted - steps[1:]).abs()).amax())  # (2)
        if distance < best:
            best, alpha = distance, exponent
    return min(alpha, NO_TAIL)


def _fullest(logs: Float[Tensor, " n"], bins: int) -> tuple[float, float]:
    """Both ends of the fullest bin, the lowest on a tie."""
    low, width = float(logs[0]), float(logs[-1] - logs[0]) / bins
    counts = torch.bincount(((logs - low) / width).long().clamp_max(bins - 1), minlength=bins).tolist()
    fullest = counts.index(max(counts))
    return low + fullest * width, low + (fullest + 1) * width
