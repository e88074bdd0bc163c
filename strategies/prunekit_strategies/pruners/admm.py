"""ADMM with whole groups: a weight that fits the outputs and a weight that is sparse are pulled together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, check_choices, solved

Start = Literal["compensated", "output", "relaxed"]


@dataclass(frozen=True)
class ADMM(LocalPruner):
    """Split min ‖W X - Ŵ X‖² into a fit W and a copy Z that keeps k groups, with the closed-form mask in between.

    In scaled inputs, D = diag(H)^½, A = D⁻¹ H D⁻¹ (d_in, d_in), W₀ = W* D (d_out, d_in), with the scaled dual U:

        fit      W ← (W₀ A + ρ (Z - U)) (A + ρI)⁻¹                                             (1)
        mask     Z ← W + U on the k groups of largest ‖(W + U)_:g‖_F, 0 elsewhere               (2)
        dual     U ← U + W - Z                                                                 (3)
        first    mask of Z: the k groups of largest score_g, by `start`:                        (4)
                 output       Σ_j ‖W₀_:j‖²                   (the separable optimum)
                 compensated  Σ_j ‖W₀_:j‖² / (A⁻¹)_jj        (the others make up for column j)
                 relaxed      1 - q_g, q = argmin qᵀQq with Σ_g q_g = n - k and 0 ≤ q ≤ 1, where qᵀQq, Q = (W₀ᵀW₀) ∘ A
                              summed over pairs of groups, is the error of masking the groups with q = 1

    Then the exact least-squares refit of the last mask, so no tolerance of (1)-(3) is left in the weights.

    Source: STRUPRUNE (arXiv 2510.03246) for group ADMM with a closed-form mask inside one layer; ALPS (Meng et al.
    2024, arXiv 2406.07831) for the scaling and the one eigendecomposition that serves every ρ.
    Ours: ρ grows geometrically up to λ_max(A), where hard thresholds settle. A constant ρ ≥ λ_max freezes (2) on
    its first mask. All rungs share each (A + ρI)⁻¹, and each starts afresh: a count has one answer, whatever else
    is on its ladder.

    (1)-(3) only choose groups, so they run in float32; A and the refit are float64. Counts are exact on ties, where the
    lower id stays in (4), and what rounding prefers in (2).
    """

    iterations: int = 40  # rounds of (1)-(3) per layer; 0: the first mask, refitted
    first_rho: float = 1e-3  # ρ of the first round, in units of λ_max(A)
    rho: float = 1.0  # ρ of the last round, in units of λ_max(A); from 1 on the rounds converge
    start: Start = "compensated"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.iterations < 0 or not 0 < self.first_rho <= self.rho:
            raise ValueError(
                "iterations ≥ 0 and 0 < first_rho ≤ rho are needed, not "
                f"{self.iterations}, {self.first_rho} and {self.rho}"
            )

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        scale = layer.hessian.diagonal().sqrt()  # D
        gram = layer.hessian / scale / scale[:, None]  # A
        weight = layer.target * scale  # W₀
        eigen = torch.linalg.eigh(gram)
        counts = torch.as_tensor(list(keeps), dtype=torch.long, device=gram.device)

        def choose(price: Float[Tensor, "rungs d_in"]) -> Bool[Tensor, "rungs 1 d_in"]:
            return columns(price.unflatten(1, (layer.n_groups, -1)).sum(2))

        def columns(score: Float[Tensor, "rungs n_groups"]) -> Bool[Tensor, "rungs 1 d_in"]:
            return _largest(score, counts).repeat_interleave(layer.group_size, 1)[:, None]

        if self.start == "relaxed":
            pairs = ((weight.T @ weight) * gram).unflatten(0, (layer.n_groups, -1)).unflatten(2, (layer.n_groups, -1))
            quadratic = pairs.sum((1, 3))
            removed = [relaxed(quadratic, layer.n_groups - int(keep)) for keep in keeps]
            mask = columns(1 - torch.stack(removed)) if removed else columns(quadratic[:0])  # (4)
        else:
            mask = choose(self._price(weight, eigen).expand(len(counts), -1))  # (4)
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

    @property
    def keeps_scales(self) -> bool:
        return False

    def keep(self, layer: LayerProblem, groups: Sequence[int], scales: Tensor | None = None) -> Candidate:
        return layer.refitted(groups)

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        """score_g of (4), separable: a relaxed start has one for every count only, and scores as `output` does."""
        scale = layer.hessian.diagonal().sqrt()
        eigen = torch.linalg.eigh(layer.hessian / scale / scale[:, None])
        return layer.group_sum(self._price(layer.target * scale, eigen))

    def _price(self, weight: Float[Tensor, "d_out d_in"], eigen: tuple[Tensor, Tensor]) -> Float[Tensor, " d_in"]:
        values, vectors = eigen
        price = weight.square().sum(0)
        if self.start == "compensated":
            price = price / (vectors.square() / values.clamp_min(1e-12)).sum(1)
        return price


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


def relaxed(quadratic: Float[Tensor, "n n"], total: int) -> Float[Tensor, " n"]:
    """argmin qᵀQq with Σ q = total and 0 ≤ q ≤ 1, by its closed form on the free groups F:

        Q_FF q_F + Q_FO 1 = ν 1      O the groups at 1, ν such that the sum is met; with nothing fixed q = ν Q⁻¹1

    What leaves 0 … 1 is fixed there, the side that is further out first; what would lower the error from where it is
    fixed (a gradient on the wrong side of ν) is let go, until neither happens.
    """
    n, scale = len(quadratic), quadratic.diagonal().mean()
    q = quadratic.new_full((n,), total / n)
    if total in (0, n) or not scale > 0:
        return q
    quadratic = quadratic + 1e-9 * scale * torch.eye(n).to(quadratic)  # where masking some together costs nothing
    fixed = torch.zeros(n, dtype=torch.bool, device=q.device)  # at the value that q has there
    for tries in range(200):  # a few are enough; a start need not be the optimum
        f, o = (~fixed).nonzero().flatten(), fixed.nonzero().flatten()
        pull = quadratic[f][:, o] @ q[o]  # Q_FO 1
        right = torch.stack([torch.ones_like(pull), pull], 1)
        one, back = solved(quadratic[f][:, f], right).unbind(1)
        level = (total - q[o].sum() + back.sum()) / one.sum()  # ν
        q[f] = level * one - back
        below, above = (-q).clamp_min(0), (q - 1).clamp_min(0)
        wrong = below if below.sum() > above.sum() else above
        if not bool(wrong.any()):
            slope = quadratic @ q - level
            wrong = slope.abs() * (fixed & (slope.abs() > 1e-9 * level.abs()) & ((slope < 0) == (q == 0)))
            if not bool(wrong.any()):
                break
        now = wrong > 0 if tries < 20 else wrong == wrong.max()  # one at a time where all at once go in circles
        q = torch.where(now, q.clamp(0, 1), q)
        fixed = fixed ^ now
    return q.clamp(0, 1)


def _largest(score: Float[Tensor, "rungs n_groups"], counts: Tensor) -> Bool[Tensor, "rungs n_groups"]:
    """Per row exactly `counts` groups of largest score; on a tie the lower id."""
    place = score.argsort(descending=True, stable=True).argsort()  # 0 for the largest
    return place < counts[:, None]
