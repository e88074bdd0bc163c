"""Compliance: how softly a site gives way when some of its groups are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prunekit import LayerProblem, Signal


@dataclass(frozen=True)
class Compliance(Signal):
    """c = 1ᵀ Q⁻¹ 1: the best relaxed mask that removes k groups costs the relative error k² / c.

    Without compensation the mask q (1 where a group is removed) costs qᵀ Q q, with

        Q_gh = Σ_{i ∈ g, j ∈ h} (WᵀW ∘ H)_ij / E‖W x̂‖²                                        (1)
        min { qᵀ Q q : 1ᵀ q = k }  =  k² / 1ᵀQ⁻¹1                                             (2)

    Q (n_groups, n_groups) has a `damping` share of its mean diagonal added to it. `diagonal` leaves out what groups
    do to each other: c = Σ_g 1/Q_gg.

    Source: the closed-form mask of STRUPRUNE (arXiv 2510.03246), whose formulas for allocation are not public: ours.
    0 where the site puts nothing out, since there is no error to speak of.
    """

    unitless: ClassVar[bool] = True
    diagonal: bool = False

    def measure(self, layer: LayerProblem) -> float:
        weight = layer.weight.double()
        power = (weight.T @ weight) * layer.gram.double()  # (d_in, d_in)
        total = float(power.sum())
        if total <= 0:
            return 0.0
        size = layer.group_size
        stiffness = power.unflatten(0, (-1, size)).unflatten(2, (-1, size)).sum((1, 3)) / total  # (1)
        floor = max(layer.damping, 1e-6) * stiffness.diagonal().mean()
        stiffness.diagonal().add_(floor)
        if self.diagonal:
            return float((1 / stiffness.diagonal()).sum())
        ones = torch.ones(len(stiffness), 1, dtype=stiffness.dtype, device=stiffness.device)
        return float(torch.cholesky_solve(ones, torch.linalg.cholesky(stiffness)).sum())  # (2)
