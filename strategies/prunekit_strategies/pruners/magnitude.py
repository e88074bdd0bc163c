"""Magnitude: keep the groups with the largest weights. The baseline that reads no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner
from prunekit.layer import ranked


@dataclass(frozen=True)
class Magnitude(LocalPruner):
    """Keep the groups whose weights have the largest squared norm, everything that goes with a group included.

        score_g = ‖W_:g‖²_F + Σ ‖rows that feed g‖²                                   (1)

    The second term is there when calibration gathers the coupled tensors (gate and up rows of a neuron;
    query, key and value rows of a head). On a tie the lower id stays.
    """

    refit: bool = False  # least-squares weights on the kept groups; False: as they are

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"coupled", "gram"} if self.refit else {"coupled"})

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        score = layer.group_sum(layer.weight.double().square())
        return score if layer.coupled is None else score + layer.coupled.to(score)  # (1)

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        ranking = ranked(self.scores(layer))
        if self.refit:
            return layer.nested(ranking).candidates(keeps)
        return [layer.masked(ranking[:keep]) for keep in keeps]
