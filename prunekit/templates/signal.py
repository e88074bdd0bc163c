"""A signal for prunekit: one number per site, by which allocators that map it to a share decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Signal):
    """How evenly the groups of a site share the input power, from 1 / n_groups to 1.

        p_g = Σ_{j ∈ g} E[x_j²]                   the power that group g receives                     (1)
        (Σ_g p_g)² / (n_groups Σ_g p_g²)          the effective number of groups, as a share          (2)

    Source: write here the paper, and where the code differs from it.
    """

    unitless: ClassVar[bool] = True  # the number does not change with the scale of the weights

    def measure(self, layer: pk.LayerProblem) -> float:
        """The number of this site: your formula goes here."""
        power = layer.group_sum(layer.gram.diagonal().double())  # (1), (n_groups,)
        squares = float(power.square().sum())
        return float(power.sum()) ** 2 / (layer.n_groups * squares) if squares > 0 else 0.0  # (2)
