"""ALPS: ADMM between a weight that fits the outputs and one that is sparse, then the best weights on its support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, Need, best_weights
from prunekit.layer.candidates import Per
from prunekit_strategies.pruners.compensation import SINGLE, Aim, aimed, best, check, needed, reached

Mask = Bool[Tensor, "d_out d_in"]
Rule = Literal["grow", "released", "constant"]


@dataclass(frozen=True)
class ALPS(LocalPruner):
    """Choose single weights by ADMM on the l0-constrained problem; then solve on what it settles on.

    In scaled inputs, S = diag(H)^½, A = S⁻¹ H S⁻¹ (d_in, d_in), B₀ = W* S (d_out, d_in), from D = B₀ and Y = 0:

        fit        B ← (B₀ A - Y + ρ D) (A + ρI)⁻¹                                    (1)
        sparse     D ← B + Y / ρ where it is largest, 0 elsewhere; k d_out weights     (2)
        dual       Y ← Y + ρ (B - D)                                                  (3)
        penalty    every third round, s the weights of the support that are new since:
                   ρ ← 1.3 ρ if s ≥ 0.1 k d_out;  1.2 ρ if s ≥ 0.005 k d_out;  1.1 ρ if s > 0;  end if s = 0   (4)
        or         s those that are new or gone; 1.3 and 1.2 as above; until one of them has been, ρ ← ρ / 5, and
                   where s > 0 B, D and Y as in the beginning; then 1.1 ρ if s > 0, and the end if s = 0; after 30
                   rounds the end if s < 0.0003 k d_out; D begins as the k d_out largest of B₀
                                                                                     rule: released            (4')

    then the least squares of every row on the support of D, exact up to `exact` inputs, by conjugate gradients
    beyond. On a fixed support (1)-(3) converge to that optimum for every ρ; with (2) to a point that is optimal on
    its own support, once ρ is large.

    Source: Meng et al. 2024 (arXiv 2406.07831), algorithms 1 and 2, whose 10 gradients are more here; (4') is the
    released code's, which keeps the same weights, but for rounding. Ours: (4), which never lowers ρ; every count starts
    afresh, so that it has one answer whatever else is asked; the aims of `obs`. (1)-(3) only choose, so they run in
    float32; A and the solution are float64. Weights that nothing reaches go first; on a tie of (2) the lower column
    stays.
    """

    structures: ClassVar[frozenset[str]] = SINGLE

    aim: Aim = "own"  # its own output on what it will see, the dense model's output, or its residual stream
    per: Per = "layer"  # rows keep as many as (2) says, or k each
    rho: float = 0.1  # ρ of the first rounds; 1 is the mean eigenvalue of A
    rule: Rule = "grow"  # (4), or (4')
    rounds: int = 300  # most rounds of (1)-(3) per count; 0: the k d_out largest of B₀
    exact: int = 1024  # inputs up to which rows are solved exactly
    steps: int = 100  # conjugate gradients beyond

    def __post_init__(self) -> None:
        check(self, None)
        if self.rho <= 0 or self.rounds < 0 or self.exact < 0 or self.steps < 1:
            raise ValueError(
                "rho > 0, rounds ≥ 0, exact ≥ 0 and steps ≥ 1 are needed, not "
                f"{self.rho}, {self.rounds}, {self.exact} and {self.steps}"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return needed(self.aim, None)

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        layer = aimed(layer, self.aim)
        scale = layer.hessian.diagonal().sqrt()  # S
        gram = layer.hessian / scale / scale[:, None]  # A
        weight = layer.target * scale  # B₀
        eigen = torch.linalg.eigh(gram)
        alive = reached(layer)
        candidates = []
        for keep in keeps:

            def choose(x: Tensor, keep: int = keep) -> Mask:
                return best_weights(alive * x.abs(), [keep], self.per, layer.m)[0]

            mask = choose(weight)
            if self.rounds and 0 < keep < layer.d_in:
                *_, mask = alternate(weight.float(), gram.float(), eigen, choose, self.rho, self.rounds, self.rule)
            candidates.append(best(layer, mask, exact=self.exact, steps=self.steps))
        return candidates


def alternate(
    weight: Float[Tensor, "d_out d_in"],
    gram: Float[Tensor, "d_in d_in"],
    eigen: tuple[Tensor, Tensor],
    choose: Callable[[Tensor], Mask],
    rho: float,
    rounds: int,
    rule: Rule = "grow",
) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, "d_out d_in"], Mask]:
    """(1)-(4); the last fit B, sparse D and support. With `constant` ρ stays and every round is made."""
    values, vectors = (part.to(weight) for part in eigen)
    reached = weight @ gram  # B₀ A
    mask = seen = choose(weight)
    first, grown = weight if rule != "released" else torch.where(mask, weight, 0), False
    b, d, y = weight, first, torch.zeros_like(weight)
    inverse = (vectors / (values + rho)) @ vectors.T
    for i in range(rounds):
        b = (reached - y + rho * d) @ inverse  # (1)
        x = b + y / rho
        mask = choose(x)
        d = torch.where(mask, x, 0)  # (2)
        y = y + rho * (b - d)  # (3)
        if rule == "constant" or i % 3 != 2:
            continue
        kept = max(int(mask.sum()), 1)
        if rule == "grow":
            new = int((mask & ~seen).sum()) / kept
            if not new:
                break
            rho *= 1.3 if new >= 0.1 else 1.2 if new >= 0.005 else 1.1  # (4)
        else:
            new = int((mask ^ seen).sum()) / kept
            grown = grown or new > 0.005
            if (grown and not new) or (i >= 30 and new < 0.0003):
                break
            rho = min(rho * (1.3 if new > 0.1 else 1.2 if new > 0.005 else 1.1), 1e6) if grown else rho / 5  # (4')
            if new and not grown:
                b, d, y = weight, first, torch.zeros_like(weight)
        seen = mask
        inverse = (vectors / (values + rho)) @ vectors.T
    return b, d, mask
