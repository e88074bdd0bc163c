"""Influence: how far a sub-layer turns the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunekit import LayerProblem, Signal


@dataclass(frozen=True)
class Influence(Signal):
    """1 - E cos(x, x + f(x)) over tokens, x the residual stream and f the dense sub-layer: 0 where it changes nothing.

    Source: block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853) for whole blocks, cos of what enters and
    what leaves; LLM-Drop (He et al. 2024, arXiv 2406.15786) for attention and MLP apart, residual included, as here.
    """

    unitless: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"influence"})

    def measure(self, layer: LayerProblem) -> float:
        return float(layer.require("influence"))
