"""Neurons by the length of their rows and columns; inside heads, low rank, and values in a basis that is turned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, check_choices, factored
from prunekit.layer.problem import Nested, Truncated
from prunekit.plugins.pruner import Within
from prunekit.space.forms import Values
from prunekit_strategies.pruners.score import Scope, Score

Truncate = Literal["released", "optimal"]


@dataclass(frozen=True)
class Olica(Score):
    """Keep the neurons whose rows of up and gate and column of down are long, each weighed by what it receives; make
    queries and keys maps of low rank, and values narrower.

        u_g = ‖up_g ∘ z‖₂ + ‖gate_g ∘ z‖₂ + ‖W_:g‖₂ x_g        z, x: root mean squares of the inputs        (1)

    Weights stay as they are. The spared share of lowest score goes last: the released code sorts the scores, passes
    over the first int(0.01 n), and removes those that follow.

    With `heads: narrow` all heads stay. The maps of queries and keys, W, are truncated each by itself, rotary positions
    behind them:

        W S = U Σ Vᵀ,   Ŵ_r = U_r U_rᵀ W        released: S = diag(x);   optimal: S Sᵀ = H + λI             (2)

    Of KV head g, let V_g (width, d) make the values, O_h (d_out, width) read them for the query head h, and
    H_h = E[a aᵀ] be the second moment of a, the values that h has added up. Any invertible T leaves the head as it is,
    O_h V_g = (O_h T⁻¹)(T V_g), and no softmax or position is in between. So a basis is chosen, and its first r
    directions stay:

        released    R of Σ_h O_hᵀ diag(y²) O_h = R Λ Rᵀ,   y² = E[y ∘ y] of the map's output y = Σ_h O_h a   (3)
                    s_j = ‖(RᵀV_g)_j: ∘ z‖₂ + (Σ_h ‖O_h R_:j‖² R_:jᵀ H_h R_:j)^½                             (4)
                    B = rows of Rᵀ of largest s_j,   U_h = O_h Bᵀ                                            (5)
        optimal     S Sᵀ = mean of H_h + λI over h,   [O_h S] = Q Σ Pᵀ, below each other                     (6)
                    B = P_rᵀ S⁻¹,   U_h = O_h S P_r                                                          (7)

    and V_g becomes B V_g, O_h becomes U_h. Of a KV head with one query head (7) loses the least of all,
    E‖(O_h - U_h B) a‖² = Σ_{i > r} σ_i² (λ = 0; Eckart and Young); of several where their H_h are alike.

    Source: Olica (He & Lin 2025, arXiv 2506.08436), from its released code: (1), (2) and (3)-(5) for one query head to
    each KV head. Ours: several, (6), (7) and the optimal S of (2), which are derived; bases in float64; y of (3) behind
    pruned blocks, there of the dense model. Where groups are heads, (1) is summed over all rows and columns of a KV
    group; the paper removes none. Its shares are the allocator `olica`, its linear calibration the finisher
    `linear-patch`. On a tie the lower id stays.
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups", "low-rank", "values"})

    weight_norm: float = 2.0
    scope: Scope = "coupled"
    within: Within = "block"
    spared: float = 0.01  # share of the groups, those of lowest score, that is removed last; 0: none
    truncate: Truncate = "released"  # of queries, keys and values

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if not 0 <= self.spared < 1:
            raise ValueError(f"a share of the groups is spared, from 0 to below 1, not {self.spared}")

    @property
    def matrices(self) -> int:
        return 3 if self.truncate == "optimal" else max(super().matrices, 1)

    def ranking(self, layer: LayerProblem) -> list[int]:
        order = super().ranking(layer)
        rest = len(order) - int(self.spared * len(order))
        return order[rest:] + order[:rest]

    def nested(self, layer: LayerProblem) -> Nested | Truncated | None:
        if layer.structure == "low-rank":
            return layer.truncated(torch.linalg.svd(self._scaled(layer), full_matrices=False)[0])  # (2)
        return super().nested(layer) if layer.structure == "groups" else None

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        if layer.structure == "groups":
            return super().prune(layer, keeps)
        if layer.structure == "values":
            return self._narrowed(layer, keeps)
        nested = self.nested(layer)
        assert nested is not None
        return nested.candidates(keeps) if keeps else []

    def _scaled(self, layer: LayerProblem) -> Float[Tensor, "d_out d_in"]:
        """W S of (2)."""
        if self.truncate == "optimal":
            return layer.target @ factored(layer.hessian)
        x = layer.gram.diagonal().double().clamp_min(0).sqrt()
        least = x[x > 0].min() if bool((x > 0).any()) else torch.ones_like(x[0])
        return layer.target * torch.where(x > 0, x, least)

    def _narrowed(self, layer: LayerProblem, keeps: Sequence[int]) -> list[Candidate]:
        bases, shares = self.bases(layer)
        # (KV heads, query heads of each, d_out, r) -> (d_out, all r), and (KV heads, r, width) -> (all r, width)
        return [layer.narrowed(shares[..., :r].movedim(2, 0).flatten(1), bases[:, :r].flatten(0, 1)) for r in keeps]

    def bases(self, layer: LayerProblem) -> tuple[Float[Tensor, "g width width"], Float[Tensor, "g h d_out width"]]:
        """All rows of B of every KV head, the most important first, each of norm one, and what reads them, U of every
        query head; in float64."""
        form = layer.form
        assert isinstance(form, Values)
        by_head = layer.target.unflatten(1, (form.kv_heads, -1, layer.most)).movedim(0, 2)  # O: (g, h, d_out, width)
        found = list[tuple[Tensor, Tensor]]()
        for g, reading in enumerate(by_head):
            moments = torch.stack([_block(layer, g * len(reading) + h) for h in range(len(reading))])  # H_h
            found.append(
                _whitened(reading, moments, layer.ridge)
                if self.truncate == "optimal"
                else self._turned(layer, g, reading, moments)
            )
        bases, shares = (torch.stack(each) for each in zip(*found, strict=True))
        size = bases.norm(dim=2).clamp_min(torch.finfo(bases.dtype).tiny)  # rows of one: half precision holds them
        return bases / size[..., None], shares * size[:, None, None]

    def _turned(
        self, layer: LayerProblem, g: int, reading: Float[Tensor, "h d_out width"], moments: Tensor
    ) -> tuple[Float[Tensor, "width width"], Float[Tensor, "h d_out width"]]:
        """All rows of B of (5), the most important first, and what reads them."""
        weight = layer.target
        power = ((weight @ layer.gram.double()) * weight).sum(1).clamp_min(0)  # y²
        met = torch.einsum("how,o,hov->wv", reading, power, reading)
        turn = torch.linalg.eigh((met + met.T) / 2).eigenvectors.flip(1)  # (3)
        shares = reading @ turn
        received = torch.einsum("wj,hwv,vj->hj", turn, moments, turn).clamp_min(0)
        score = (shares.square().sum(1) * received).sum(0).sqrt()
        for producer in layer.producers:
            made = turn.T @ producer.weight.double().unflatten(0, (-1, layer.most))[g]
            score = score + (made.square() @ producer.require("power").double()).sqrt()  # (4)
        order = score.argsort(descending=True, stable=True)
        return turn.T[order], shares[..., order]  # (5)


def _whitened(
    reading: Float[Tensor, "h d_out width"], moments: Float[Tensor, "h width width"], ridge: float
) -> tuple[Float[Tensor, "width width"], Float[Tensor, "h d_out width"]]:
    """All rows of B of (7), the most important first, and what reads them."""
    mean = moments.mean(0)
    mean.diagonal().add_(ridge)
    root = factored(mean)  # (6)
    seen = reading @ root
    turn = torch.linalg.svd(seen.flatten(0, 1), full_matrices=True)[2].T  # P; all of it, also of few outputs
    return torch.linalg.solve_triangular(root.T, turn, upper=True).T, seen @ turn  # (7)


def _block(layer: LayerProblem, head: int) -> Float[Tensor, "width width"]:
    """H_h, in float64 and symmetric."""
    own = slice(head * layer.most, (head + 1) * layer.most)
    block = layer.gram[own, own].double()
    return (block + block.T) / 2
