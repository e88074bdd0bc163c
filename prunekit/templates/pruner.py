"""A pruner for prunekit: which groups one layer keeps, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.LocalPruner):
    """Keep the groups through which the most power goes.

        score of group g:   s_g = Σ_{j ∈ g} ‖W_:j‖² E[x_j²]      (1)

    W is the weight (d_out, d_in) and x its input, so (1) is the output power of the group where its inputs are
    uncorrelated. Source: write here the paper, and where the code differs from it.
    """

    refit: bool = True  # least-squares weights for what stays; else the weights as they are

    @property
    def keeps_scales(self) -> bool:
        """Whether `keep` multiplies by a learner's scales: weights that were solved for need none."""
        return not self.refit

    def prune(self, layer: pk.LayerProblem, keeps: Sequence[int]) -> Sequence[pk.Candidate]:
        """One candidate for every count in `keeps`."""
        return [self.keep(layer, groups) for groups in pk.best_groups(self.scores(layer), keeps)]

    def scores(self, layer: pk.LayerProblem) -> Tensor:
        """What every group is worth, (n_groups,): your formula goes here."""
        power = layer.weight.double().square().sum(0) * layer.gram.diagonal().double()  # (d_in,)
        return layer.group_sum(power)  # (1)

    def keep(self, layer: pk.LayerProblem, groups: Sequence[int], scales: Tensor | None = None) -> pk.Candidate:
        """The candidate that keeps these groups."""
        return layer.refitted(groups) if self.refit else layer.masked(groups, scales)
