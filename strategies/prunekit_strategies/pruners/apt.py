"""The multiple removal problem: whatever weights of a row go, all that stay are moved to their best values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, Need, best_weights, solved
from prunekit_strategies.pruners.compensation import (
    SINGLE,
    Aim,
    aimed,
    best,
    check,
    factor,
    given,
    needed,
    reached,
    swept,
)

Variant = Literal["SS", "SM", "MS", "MM"]


@dataclass(frozen=True)
class APT(LocalPruner):
    """Choose weights to remove one by one or in patterns, and solve for the rest of the row as a whole.

    Removing the weights P of a row w (d_in) from w*, with V = (H + λI)⁻¹ (d_in, d_in):

        loss       L(P) = w_P (V_PP)⁻¹ w_Pᵀ                             (1)
        weights    ŵ = w* - w*_P (V_PP)⁻¹ V_P:                          (2)

    A variant has two letters. The first is the mask:

        S   per row the smallest w_j² / V_jj, which is (1) of one weight
        M   per m columns of a row the P of least (1), all P tried: n:m only, single weights are chosen by S

    the second what compensates:

        S   the sweep of SparseGPT: only columns behind a removed weight move
        M   (2): no weight is frozen, so no other weights under this mask lose less

    Masks are chosen for `width` columns at a time, on what the weights have become. With M, (2) is taken anew from
    w* and all that is removed so far: taken from ŵ for what is new alone, it would revive what was removed before.
    With `mask` another pruner chooses.

    Source: Zhao et al. 2024, Pruning Foundation Models for High Accuracy without Retraining (arXiv 2410.15567).
    Ours: (2) is solved as least squares on the kept weights where they are fewer, and beyond `exact` inputs by
    conjugate gradients on all rows at once, which have the same limit; the aims of `obs`. Weights that nothing reaches
    go first; on a tie the lower column stays.
    """

    structures: ClassVar[frozenset[str]] = SINGLE

    variant: Variant = "MM"
    mask: LocalPruner | None = None  # None: the variant's own
    aim: Aim = "own"  # its own output on what it will see, the dense model's output, or its residual stream
    width: int = 128  # columns whose masks are chosen at once
    exact: int = 1024  # inputs up to which (2) is solved row by row
    steps: int = 100  # conjugate gradients beyond

    def __post_init__(self) -> None:
        check(self, self.mask)
        if self.width < 1 or self.exact < 0 or self.steps < 1:
            raise ValueError(
                f"width ≥ 1, exact ≥ 0 and steps ≥ 1 are needed, not {self.width}, {self.exact} and {self.steps}"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return needed(self.aim, self.mask)

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        masks = given(layer, self.mask, keeps) if self.mask is not None else [None] * len(keeps)
        layer = aimed(layer, self.aim)
        u = factor(layer)
        solve = self._swept if self.variant[1] == "S" else self._solved
        return [solve(layer, u, keep, mask) for keep, mask in zip(keeps, masks, strict=True)]

    def _swept(self, layer: LayerProblem, u: Tensor, keep: int, mask: Tensor | None) -> Candidate:
        def choose(here: slice, w: Tensor, part: Tensor) -> Bool[Tensor, "d_out width"]:
            if mask is not None:
                return mask[:, here]
            return self._chosen(layer, keep, here, w, part.T @ part, part.diagonal().square())

        weight, _ = swept(layer.target, u, choose, step=layer.m or self.width, width=self.width)
        return Candidate(None, layer.rounded(weight))

    def _solved(self, layer: LayerProblem, u: Tensor, keep: int, mask: Tensor | None) -> Candidate:
        if mask is not None:
            return best(layer, mask, exact=self.exact, steps=self.steps)
        w, mask = layer.target, torch.ones_like(layer.weight, dtype=torch.bool)
        candidate = layer.sparse(mask)
        width = max(self.width // layer.m, 1) * layer.m if layer.m else self.width
        for start in range(0, layer.d_in, width):
            here = slice(start, min(start + width, layer.d_in))
            inverse = u[:, here].T @ u[:, here]  # V of these columns
            mask[:, here] = self._chosen(layer, keep, here, w[:, here], inverse, inverse.diagonal())
            candidate = best(layer, mask, exact=self.exact, steps=self.steps, start=w)  # (2), of all that is removed
            w = candidate.weight.double()
        return candidate

    def _chosen(
        self,
        layer: LayerProblem,
        keep: int,
        here: slice,
        w: Float[Tensor, "d_out width"],
        inverse: Float[Tensor, "width width"],
        alone: Float[Tensor, " width"],  # what stands in for V_jj in S
    ) -> Bool[Tensor, "d_out width"]:
        w = w * reached(layer)[here]
        share = keep * here.stop // layer.d_in - keep * here.start // layer.d_in
        if layer.m and self.variant[0] == "M":
            return patterns(w, inverse, layer.m, keep * layer.m // layer.d_in)
        return best_weights(w.square() / alone, [share], m=layer.m)[0]


def patterns(
    w: Float[Tensor, "d_out width"], inverse: Float[Tensor, "width width"], block: int, keep: int
) -> Bool[Tensor, "d_out width"]:
    """Of every `block` columns of every row the `keep` whose complement has the least loss (1); all are tried."""
    w = w.unflatten(1, (-1, block))  # (d_out, blocks, block)
    blocks = torch.arange(w.shape[1])
    v = inverse.unflatten(0, (-1, block)).unflatten(2, (-1, block))[blocks, :, blocks]  # (blocks, block, block)
    least = w.new_full(w.shape[:2], torch.inf)
    found = torch.zeros_like(w, dtype=torch.bool)
    for kept in itertools.combinations(range(block), keep):
        gone = [j for j in range(block) if j not in kept]
        p = w[:, :, gone]
        loss = solved(v[:, gone][:, :, gone], p.permute(1, 2, 0))
        loss = (loss.permute(2, 0, 1) * p).sum(2)  # (1)
        better = loss < least  # the first of equals stays: lower columns
        least = torch.where(better, loss, least)
        found = torch.where(better[:, :, None], torch.tensor([j in kept for j in range(block)], device=w.device), found)
    return found.flatten(1)
