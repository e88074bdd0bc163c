"""SparseGPT: one sweep over the columns that removes single weights and lets those behind make up for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, Need, best_weights
from prunekit.layer.candidates import Per
from prunekit_strategies.pruners.compensation import (
    SINGLE,
    Aim,
    Choose,
    aimed,
    check,
    factor,
    given,
    needed,
    reached,
    swept,
)


@dataclass(frozen=True)
class SparseGPT(LocalPruner):
    """Remove what costs least block by block, and let the weights behind it compensate.

    W (d_out, d_in) starts at W*, U (d_in, d_in) upper with Uᵀ U = (H + λI)⁻¹. For columns j = 1 … d_in:

        mask     of `width` columns at a time, on what the weights have become:
                 keep the largest w_ij² / U_jj²                                                            (1)
        weights  e_i = w_ij / U_jj where w_ij goes,    w_i,j: ← w_i,j: - e_i U_j,j:                         (2)

    U_jj² is the inverse Hessian of the columns from j on, so (1) is the exact price of a weight to those behind it.
    For n:m the columns of (1) are the m of a pattern. Every block keeps its share of k, rounded down, and what is
    left goes to the next. All counts share U, and each has a sweep of its own.

    With `mask` another pruner chooses and this one compensates. The weights are never better than the least squares
    under the same mask (`apt`), and the same where what goes stands in front of what stays.

    Source: Frantar & Alistarh 2023 (arXiv 2301.00774), algorithm 1; the paper's block for masks and for updates is one.
    Ours: U comes from one Cholesky factor of H read backwards, without H⁻¹; the aims of `obs`. Weights that nothing
    reaches go first; on a tie the lower column stays.
    """

    structures: ClassVar[frozenset[str]] = SINGLE

    mask: LocalPruner | None = None  # None: (1)
    aim: Aim = "own"  # its own output on what it will see, the dense model's output, or its residual stream
    per: Per = "layer"  # rows of a block keep as many as (1) says, or k each
    width: int = 128  # columns whose mask is chosen at once

    def __post_init__(self) -> None:
        check(self, self.mask)
        if self.width < 1:
            raise ValueError(f"width is at least one column, not {self.width}")

    @property
    def needs(self) -> frozenset[Need]:
        return needed(self.aim, self.mask)

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        masks = given(layer, self.mask, keeps) if self.mask is not None else [None] * len(keeps)
        layer = aimed(layer, self.aim)
        u, step = factor(layer), layer.m or self.width
        candidates = []
        for keep, mask in zip(keeps, masks, strict=True):
            choose = self._own(layer, keep) if mask is None else _fixed(mask)
            weight, _ = swept(layer.target, u, choose, step=step, width=self.width)
            candidates.append(Candidate(None, layer.rounded(weight)))
        return candidates

    def _own(self, layer: LayerProblem, keep: int) -> Choose:
        alive = reached(layer)

        def choose(
            here: slice, w: Float[Tensor, "d_out width"], u: Float[Tensor, "width width"]
        ) -> Bool[Tensor, "d_out width"]:
            share = keep * here.stop // layer.d_in - keep * here.start // layer.d_in
            score = (alive[here] * w / u.diagonal()).square()  # (1)
            return best_weights(score, [share], "row" if layer.m else self.per)[0]

        return choose


def _fixed(mask: Bool[Tensor, "d_out d_in"]) -> Choose:
    return lambda here, *_: mask[:, here]
