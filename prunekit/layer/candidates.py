"""Candidates: answers to the question which groups, which single weights, or which rank to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Per = Literal["row", "layer"]
"""Among which weights single ones compete to stay."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One answer: which groups stay, and the weight with exact zeros elsewhere; or two factors, and their product."""

    kept: tuple[int, ...] | None  # ids, ascending; None when the structure has no groups
    weight: Float[Tensor, "d_out d_in"]
    factors: tuple[Float[Tensor, "d_out m"], Float[Tensor, "k n"]] | None = None
    """Of low rank, U (d_out, r) and V (r, d_in); of narrower values, those of `narrow_product`. None: not factored."""
    producers: tuple[Tensor, ...] = ()
    """Weights of the producer layers of a cut sub-layer, in order, as `CutSubLayer.candidate` makes them; (): the rows
    of the dense ones."""

    def to(self, device: torch.device | str) -> Candidate:
        """On another device, without a history."""
        factors = None if self.factors is None else (moved(self.factors[0], device), moved(self.factors[1], device))
        producers = tuple(moved(each, device) for each in self.producers)
        return Candidate(self.kept, moved(self.weight, device), factors, producers)


def moved(values: Tensor, device: torch.device | str) -> Tensor:
    """On another device, without a history."""
    return values.detach().to(device)


def product(left: Float[Tensor, "d_out r"], right: Float[Tensor, "r d_in"]) -> Float[Tensor, "d_out d_in"]:
    """Of two factors, in float32 or better: the model multiplies by one after the other, and never rounds it."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)


def narrow_product(
    left: Float[Tensor, "d_out columns"], right: Float[Tensor, "rows width"], heads: int
) -> Float[Tensor, "d_out d_in"]:
    """Of the map behind attention, where values get narrower, in float32 or better.

        Ŵ_h = U_h B_g        (d_out, width), of every query head h and its KV head g

    Args:
        left: all U_h (d_out, r), side by side.
        right: all B_g (r, width), one below the other; the query heads of one of them are neighbours.
        heads: query heads.
    """
    wide, rank = torch.promote_types(left.dtype, torch.float32), left.shape[1] // heads
    bases = right.to(wide).unflatten(0, (-1, rank))  # (KV heads, r, width)
    shares = left.to(wide).unflatten(1, (len(bases), -1, rank))  # (d_out, KV heads, query heads of each, r)
    return torch.einsum("ogqr,grw->ogqw", shares, bases).flatten(1)


def is_sparse(weight: Float[Tensor, "d_out d_in"], keep: int, m: int = 0) -> bool:
    """Whether a weight has `keep` non-zeros per row or fewer: on average, or in every block of so many inputs alike."""
    there = weight != 0
    if m:
        return bool((there.unflatten(1, (-1, m)).sum(-1) <= keep * m // weight.shape[1]).all())
    return int(there.sum()) <= keep * len(weight)


def ranked(score: Float[Tensor, " n_groups"]) -> list[int]:
    """Group ids from the largest score to the smallest; on a tie the lower id comes first.

    Raises:
        ValueError: a score is not finite.
    """
    if not bool(torch.isfinite(score).all()):
        raise ValueError(f"scores must be finite; group {int((~torch.isfinite(score)).nonzero()[0])} is not")
    return torch.argsort(score, descending=True, stable=True).tolist()


def best_groups(score: Float[Tensor, " n_groups"], keeps: Sequence[int]) -> list[list[int]]:
    """For every count, the ids of the groups with the largest scores, ascending; on a tie the lower id stays.

    Raises:
        ValueError: a score is not finite.
    """
    order = ranked(score)
    return [sorted(order[:keep]) for keep in keeps]


def best_weights(
    score: Float[Tensor, "d_out d_in"], keeps: Sequence[int], per: Per = "row", m: int = 0
) -> list[Bool[Tensor, "d_out d_in"]]:
    """For every count k, the mask of the k · d_out weights of largest score; on a tie the lower column stays.

    Args:
        score: of every weight, larger is better; finite.
        keeps: counts of weights per row.
        per: row, each row keeps k; layer, rows may keep more or less.
        m: not 0: whatever `per` says, each row keeps k · m / d_in in every m consecutive columns.

    Returns:
        One mask for every count, in the order of `keeps`.

    Raises:
        ValueError: a score is not finite, or blocks do not fit the columns or a count.
    """
    if per not in get_args(Per):
        raise ValueError(f"no per {per!r}; there are {', '.join(get_args(Per))}")
    if not bool(torch.isfinite(score).all()):
        raise ValueError(f"scores must be finite; weight {(~torch.isfinite(score)).nonzero()[0].tolist()} is not")
    d_out, d_in = score.shape
    size = m or d_in
    if d_in % size or any(keep * size % d_in for keep in keeps):
        raise ValueError(f"{list(keeps)} of {d_in} weights are not whole numbers in every {size}")
    if per == "layer" and not m:
        place = _places(score.T.flatten()).reshape(d_in, d_out).T
        return [place < keep * d_out for keep in keeps]
    place = _places(score.unflatten(1, (-1, size))).flatten(1)
    return [place < keep * size // d_in for keep in keeps]


def _places(score: Float[Tensor, "... n"]) -> Tensor:
    """0 for the largest along the last axis, then 1, …; on a tie the lower id comes first."""
    return score.argsort(descending=True, stable=True).argsort()
