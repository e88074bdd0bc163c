"""Stiffness: how much a site resists when some of its groups are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prunekit import LayerProblem, Signal, solved


@dataclass(frozen=True)
class Stiffness(Signal):
    """A = n² / c: the best relaxed mask that removes the share s of all groups costs the relative error A s².

    Without compensation the mask q (1 where one of the n groups is removed) costs qᵀ Q q, with

        Q_gh = Σ_{i ∈ g, j ∈ h} (WᵀW ∘ H)_ij / E‖W x̂‖²                                        (1)
        min { qᵀ Q q : 1ᵀ q = k }  =  k² / c,   c = 1ᵀ Q⁻¹ 1, the compliance                  (2)

    so 0 ≤ A ≤ 1; 0 where the site puts nothing out, 1 where no mask is better than the even one. Q has a share
    `damping` of its mean diagonal added to it. `diagonal` leaves out what groups do to each other: c = Σ_g 1/Q_gg.

    Source: the closed-form mask of STRUPRUNE (arXiv 2510.03246); derived: its formulas for allocation were not found.
    """

    unitless: ClassVar[bool] = True
    diagonal: bool = False

    def measure(self, layer: LayerProblem) -> float:
        weight = layer.weight.double()
        power = (weight.T @ weight) * layer.gram.double()  # (d_in, d_in)
        total = float(power.sum())
        if total <= 0:
            return 0.0
        n, size = layer.n_groups, layer.group_size
        q = power.reshape(n, size, n, size).sum((1, 3)) / total  # (1)
        q.diagonal().add_(max(layer.damping, 1e-6) * q.diagonal().mean())
        if self.diagonal:
            return n * n / float((1 / q.diagonal()).sum())
        ones = torch.ones(n, 1, dtype=q.dtype, device=q.device)
        return n * n / float(solved(q, ones).sum())  # (2)
