"""REAP: experts that add little where they are selected go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import LayerProblem, Need, Received, Statistic
from prunekit.layer.statistics import MapShape, Sums, Total
from prunekit_strategies.pruners.ranking import Ranking


@dataclass(frozen=True)
class RouterWeighted(Statistic):
    """E[g_e ‖f_e‖ | e is selected]: the mean norm of what an expert adds, over the tokens that select it; 0 if none do.

    A token has selected what adds something other than zeros. Of an input that is no expert it is the mean of |x̂_j|
    where that is not zero.
    """

    name: ClassVar[str] = "router-weighted"

    def sizes(self, shape: MapShape) -> dict[str, tuple[int, ...]]:
        return {"norms": (shape.d_in,), "tokens": (shape.d_in,)}

    def add(self, sums: Sums, received: Received) -> None:
        added = received.by_token(received.inputs)  # (tokens, channels, experts)
        norms = torch.linalg.vector_norm(added, dim=1, dtype=torch.promote_types(added.dtype, torch.float32)).double()
        sums["norms"] += norms.sum(0)
        sums["tokens"] += (norms > 0).sum(0)

    def finish(self, sums: Sums, total: Total) -> Tensor:
        return sums["norms"] / sums["tokens"].clamp_min(1)


@dataclass(frozen=True)
class REAP(Ranking):
    """Router-weighted expert activation pruning: keep the experts that add most where they are selected.

        S_e = (1 / |T_e|) Σ_{t ∈ T_e} g_e(t) ‖f_e(t)‖₂        T_e the tokens that select expert e             (1)

    g_e is the weight that the model gives the expert's output f_e. An expert that is never selected has S_e = 0; on a
    tie the lower id stays. Weights of what is kept stay as they are.

    Source: Lasby et al. 2025 (arXiv 2510.13999) and its released code, whose score `reap` is (1), with the same number
    of experts in every layer: the recipe `reap`. There g_e is a softmax over all experts, normalised over those that
    are selected where an option says so; here it is what the model itself multiplies with, so that the two agree where
    that option is as the model's. There all layers are scored while the model is dense, as with `carry: dense`. Its
    options that spare experts with large activations are not here.

    Ours: of a site without experts the score of a group is the sum of the mean |x_j| where it is not zero.
    """

    refit: bool = False  # one factor for every expert that stays, by least squares at the routing of the dense model

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({RouterWeighted(), *(("gram",) if self.refit else ())})

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        """S_e in float64."""
        return layer.group_sum(layer.require(RouterWeighted()))  # (1)
