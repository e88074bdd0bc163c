"""Outliers: the share of weights that count far more than the average one. OWL's number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from prunekit import LayerProblem, Signal


@dataclass(frozen=True)
class Outliers(Signal):
    """Share of a site's weights whose Wanda score is more than `multiple` times the mean score.

        A_ij = |W_ij| √E[x̂_j²]                                                                (1)
        D    = share of all A_ij of the site with A_ij > M mean(A)                            (2)

    over the linear map that is cut and the maps in front of it (query, key and value; gate and up), pooled.

    Source: OWL (Yin et al. 2024, arXiv 2310.05175), which pools a whole block; M = 5 for LLaMA. Here a sub-layer is
    pooled, since an allocator may want to tell attention and MLP apart; the mean of (2) is the sub-layer's own.
    """

    unitless: ClassVar[bool] = True
    multiple: float = 5.0  # M

    def __post_init__(self) -> None:
        if not self.multiple > 0:
            raise ValueError(f"a multiple of the mean is above 0, not {self.multiple}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "power"})

    def measure(self, layer: LayerProblem) -> float:
        maps = [(layer.weight, layer.gram.diagonal())]
        maps += [(producer.weight, producer.require("power")) for producer in layer.producers]
        total, count, above = 0.0, 0, 0
        for scores in map(_scores, maps):
            total, count = total + float(scores.sum()), count + scores.numel()
        for scores in map(_scores, maps):  # made twice, so that only one map's are there at a time
            above += int((scores > self.multiple * total / count).sum())  # (2)
        return above / count


def _scores(linear: tuple[Tensor, Tensor]) -> Float[Tensor, "m n"]:
    """(1) from a weight and the power of its inputs."""
    weight, power = linear
    return weight.double().abs() * power.double().clamp_min(0).sqrt()
