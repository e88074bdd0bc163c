"""Influence: how far a sub-layer turns the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from prunekit import LayerProblem, Signal, check_choices


@dataclass(frozen=True)
class Influence(Signal):
    """1 - E cos(x, x + f(x)) over tokens, x the residual stream and f the dense sub-layer: 0 where it changes nothing.

    With `since: block` the sum is compared with what the block receives: at its last sub-layer the number is that of
    the whole block.

    Source: block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853) for whole blocks, cos of what enters and
    what leaves, as `since: block`; LLM-Drop (He et al. 2024, arXiv 2406.15786) for attention and MLP apart, residual
    included.
    """

    unitless: ClassVar[bool] = True

    since: Literal["sub-layer", "block"] = "sub-layer"  # before which the stream is that is compared

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"influence" if self.since == "sub-layer" else "turn"})

    def measure(self, layer: LayerProblem) -> float:
        (name,) = self.needs
        return float(layer.require(name))
