"""Give what removed weights were worth, as their mean, to the weights that stay: MAMA's movement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, Need
from prunekit_strategies.pruners.compensation import SINGLE, check, given
from prunekit_strategies.pruners.score import Magnitude


@dataclass(frozen=True)
class MeanMove(LocalPruner):
    """Under the mask of another pruner, move every row's kept weights along one direction.

    With K the kept and P the removed weights of a row w, x̄ the means of the inputs:

        even    w_K ← w_K + (Σ_P w) / |K|                                                  (1)
        inputs  w_K ← w_K + (w_P · x̄_P) x̄_K / ‖x̄_K‖²                                       (2)

    (1) keeps the sum of every row, so it is exact on inputs that are the same in all channels. (2) keeps the row's
    output on the mean input, as FLAP's bias does, without a bias; where all means are equal it is (1). Both move along
    one fixed direction, so neither is ever better than least squares under the same mask (`apt`, or `refit: true`).
    A row that keeps nothing, or whose kept inputs have mean zero, stays as it is.

    Source: MAMA (arXiv:2505.14052), whose idea is a movement of kept weights by the mean of those that go; (1) and (2)
    are derived. The public stub sets the removed weights to zero before it takes their mean: its movement is zero, and
    what it makes is pruning by magnitude. The paper's indicator, which is learned, was not found as a formula.
    """

    structures: ClassVar[frozenset[str]] = SINGLE

    mask: LocalPruner = field(default_factory=Magnitude)  # chooses
    along: Literal["even", "inputs"] = "even"  # (1) or (2)

    def __post_init__(self) -> None:
        check(self, self.mask)

    @property
    def needs(self) -> frozenset[Need]:
        return self.mask.needs | (frozenset({"mean"}) if self.along == "inputs" else frozenset())

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        w = layer.weight.double()
        means = torch.ones_like(w[0]) if self.along == "even" else layer.require("mean").double()
        masks = given(layer, self.mask, keeps)
        return [Candidate(None, layer.rounded(moved(w, mask, means))) for mask in masks]


def moved(
    w: Float[Tensor, "d_out d_in"], mask: Bool[Tensor, "d_out d_in"], means: Float[Tensor, " d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """(2); with means that are all one, (1)."""
    kept = torch.where(mask, means, 0)
    lost = torch.where(mask, 0, w * means).sum(1)
    size = kept.square().sum(1)
    share = torch.where(size > 0, lost / size, 0)[:, None]
    return torch.where(mask, w + share * kept, 0)
