"""ADMM with whole groups: a weight that fits the outputs and a weight that is sparse are pulled together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner


@dataclass(frozen=True)
class ADMM(LocalPruner):
    """Split min ‖W X - Ŵ X‖² into a fit W and a copy Z that keeps k groups, with the closed-form mask in between.

    In scaled inputs, D = diag(H)^½, A = D⁻¹ H D⁻¹ (d_in, d_in), W₀ = W* D (d_out, d_in), with the scaled dual U:

        fit      W ← (W₀ A + ρ (Z - U)) (A + ρI)⁻¹                                             (1)
        mask     Z ← W + U on the k groups of largest ‖(W + U)_:g‖_F, 0 elsewhere               (2)
        dual     U ← U + W - Z                                                                 (3)
        first    mask of Z: the k groups of largest Σ_j ‖W₀_:j‖² / s_j,  s_j = 1 or (A⁻¹)_jj    (4)

    Then the exact least-squares refit of the last mask, so no tolerance of (1)-(3) is left in the weights.

    Source: STRUPRUNE (arXiv 2510.03246) for group ADMM with a closed-form mask inside one layer; ALPS (Meng et al.
    2024, arXiv 2406.07831) for the scaling and the one eigendecomposition that serves every ρ.
    Ours: ρ grows geometrically up to λ_max(A), where hard thresholds settle. A constant ρ ≥ λ_max freezes (2) on
    its first mask. All rungs share each (A + ρI)⁻¹, and each starts afresh: a count has one answer, whatever else
    is on its ladder. (4) with (A⁻¹)_jj is the price of removing column j when the others make up for it.

    (1)-(3) only choose groups, so they run in float32; A and the refit are float64. Counts are exact on ties, where the
    lower id stays in (4), and what rounding prefers in (2).
    """

    iterations: int = 40  # rounds of (1)-(3) per layer; 0: the first mask, refitted
    first_rho: float = 1e-3  # ρ of the first round, in units of λ_max(A)
    rho: float = 1.0  # ρ of the last round, in units of λ_max(A); from 1 on the rounds converge
    start: Literal["compensated", "output"] = "compensated"  # s_j of (4): (A⁻¹)_jj, or 1 as in the separable ‖w_j‖²H_jj

    def __post_init__(self) -> None:
        if self.iterations < 0 or not 0 < self.first_rho <= self.rho:
            raise ValueError(
                "iterations ≥ 0 and 0 < first_rho ≤ rho are needed, not "
                f"{self.iterations}, {self.first_rho} and {self.rho}"
            )
        if self.start not in ("compensated", "output"):
            raise ValueError(f"no start {self.start!r}; there are compensated, output")

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        scale = layer.hessian.diagonal().sqrt()  # D
        gram = layer.hessian / scale / scale[:, None]  # A
        weight = layer.target * scale  # W₀
        eigen = torch.linalg.eigh(gram)
        counts = torch.as_tensor(list(keeps), dtype=torch.long, device=gram.device)

        def choose(price: Float[Tensor, "rungs d_in"]) -> Bool[Tensor, "rungs 1 d_in"]:
            kept = _largest(price.unflatten(1, (layer.n_groups, -1)).sum(2), counts)
            return kept.repeat_interleave(layer.group_size, 1)[:, None]

        price = weight.square().sum(0)
        if self.start == "compensated":
            price = price / (eigen.eigenvectors.square() / eigen.eigenvalues.clamp_min(1e-12)).sum(1)
        mask = choose(price.expand(len(counts), -1))  # (4)
        if self.iterations:
            growth = (self.rho / self.first_rho) ** (1 / max(self.iterations - 1, 1))
            first = self.first_rho * float(eigen.eigenvalues[-1])
            _, mask = alternate(
                weight.float(),
                gram.float(),
                eigen,
                [first * growth**i for i in range(self.iterations)],
                mask=mask,
                choose=lambda v: choose(v.square().sum(1)),
            )
        kept = mask[:, 0, :: layer.group_size]  # (rungs, n_groups)
        return [layer.refitted(row.nonzero().flatten().tolist()) for row in kept]


def alternate(
    weight: Float[Tensor, "d_out d_in"],
    gram: Float[Tensor, "d_in d_in"],
    eigen: tuple[Tensor, Tensor],
    rhos: Sequence[float],
    *,
    mask: Bool[Tensor, "rungs 1 d_in"],
    choose: Callable[[Tensor], Bool[Tensor, "rungs 1 d_in"]],
) -> tuple[Float[Tensor, "rungs d_out d_in"], Bool[Tensor, "rungs 1 d_in"]]:
    """Equations (1)-(3), one round for every ρ, all rungs side by side; the last fit W and the last mask."""
    values, vectors = (part.to(weight) for part in eigen)
    reached = weight @ gram  # W₀ A
    z = torch.where(mask, weight, 0)
    w, u = z, torch.zeros_like(z)
    for before, rho in zip([rhos[0], *rhos], rhos, strict=False):
        u *= before / rho  # ρU is the multiplier; it stays when ρ grows
        w = (reached + rho * (z - u)) @ ((vectors / (values + rho)) @ vectors.T)  # (1)
        v = w + u
        mask = choose(v)
        z = torch.where(mask, v, 0)  # (2)
        u = v - z  # (3)
    return w, mask


def _largest(score: Float[Tensor, "rungs n_groups"], counts: Tensor) -> Bool[Tensor, "rungs n_groups"]:
    """Per row exactly `counts` groups of largest score; on a tie the lower id."""
    place = score.argsort(descending=True, stable=True).argsort()  # 0 for the largest
    return place < counts[:, None]
