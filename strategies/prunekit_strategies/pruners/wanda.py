"""Wanda for structures: a weight counts as much as the input it is multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner
from prunekit.layer import ranked


@dataclass(frozen=True)
class Wanda(LocalPruner):
    """Keep the groups with the largest sum of weights times input norms.

        S_ij    = |W_ij| ‖x_j‖            ‖x_j‖ = √H_jj, root mean square over tokens      (1)
        score_g = Σ_i Σ_{j ∈ g} S_ij                                                       (2)

    Source: Sun et al. 2024 (arXiv 2306.11695), eq. 1, for single weights; Wanda-sp of FLAP (An et al. 2024,
    arXiv 2312.11983) for groups, with the mean where we take the sum: groups of a site have one size, so the order
    is the same. S_ij² is the exact error of zeroing that weight alone. On a tie the lower id stays.
    """

    refit: bool = False  # least-squares weights on the kept groups; False: as they are, as in the papers

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        norm = layer.gram.diagonal().double().clamp_min(0).sqrt()
        return layer.group_sum(layer.weight.double().abs() * norm)  # (1), (2)

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        ranking = ranked(self.scores(layer))
        if self.refit:
            return layer.nested(ranking).candidates(keeps)
        return [layer.masked(ranking[:keep]) for keep in keeps]
