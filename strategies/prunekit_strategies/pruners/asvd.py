"""Low rank by the singular values of a weight whose columns are scaled by the size of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

import prunekit as pk
from prunekit_strategies.pruners.low_rank import LowRank


@dataclass(frozen=True)
class MeanAbsolute(pk.Statistic):
    """E|x̂|, of every input."""

    name: ClassVar[str] = "mean-absolute"

    def add(self, sums: dict[str, Tensor], received: pk.Received) -> None:
        sums["sum"] += received.inputs.abs().double().sum(0)


@dataclass(frozen=True)
class ASVD(LowRank):
    """Make two linear maps of one, which follow the columns of large inputs most closely.

        s_j = (E|x̂_j|)^α                             of every input                                 (1)
        W diag(s) = U Σ Vᵀ                           singular value decomposition                   (2)
        Ŵ_r = U_r Σ_r V_rᵀ diag(s)⁻¹ = U_r (U_rᵀ W)  rank r, two factors                            (3)

    Source: ASVD (Yuan et al. 2023, arXiv 2312.05821), the scaling by mean absolute inputs, α = 0.5. `alpha: 0` is the
    singular value decomposition of the weight itself. The second form of (3) is derived. Their search for the rank of
    every layer by perplexity, layer by layer, is the business of allocators here.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 4:
            raise ValueError(f"alpha is between 0, the weight itself, and 4, not {self.alpha}")

    @property
    def needs(self) -> frozenset[pk.Need]:
        return frozenset({"gram", MeanAbsolute()})

    @property
    def matrices(self) -> int:
        return 0  # (d_in, d_in); of the weight's shape are more

    def scaled(self, layer: pk.LayerProblem) -> Float[Tensor, "d_out d_in"]:
        size = layer.require(MeanAbsolute()).double()
        size = torch.where(size > 0, size, size[size > 0].min()) if bool((size > 0).any()) else torch.ones_like(size)
        return layer.target * size**self.alpha  # (1), (2): what never receives anything is as small as the smallest
