"""Exchange of groups: take back what was dear, give what has become cheap, as long as the error falls."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit_strategies.pruners.obs import removal


def exchanged(
    hessian: Float[Tensor, "d d"],
    v: Float[Tensor, "d d"],
    weight: Float[Tensor, "d_out d"],
    size: int,
    gone: list[int],
    most: int,
    tries: int,
) -> list[int]:
    """A removed set as large as `gone` whose error is no larger, by exchanges of up to `most` groups at a time.

    With V = H⁻¹ of all columns, the columns P of a removed set, M = (V_PP)⁻¹ and B = W_P M (d_out, |P|):

        error of the set          tr[W_P M W_Pᵀ]                                        (1)
        to remove a group K more  tr[W'_K (V'_KK)⁻¹ W'_Kᵀ]   W', V' refitted without P  (2)
        to take a group R back    tr[B_R (M_RR)⁻¹ B_Rᵀ]      by so much (1) falls       (3)

    (3) is (2) read backwards: M is to the removed columns what V is to the kept ones. A try removes the t cheapest by
    (2), then takes the t dearest back by (3), and counts when (1) falls; else t is halved. `tries` are the most there
    are, since each costs a factorisation.

    Source: OSSCAR (Meng et al. 2024, arXiv 2403.12983), local search, which computes (3) from H as
    tr[g C⁻¹ gᵀ] with C = H_RR - H_RS (H_SS)⁻¹ H_SR and g = (W H)_R - (W H)_S (H_SS)⁻¹ H_SR, S the kept columns.
    """
    best, t = error_without(v, weight, size, gone), most
    for _ in range(tries):
        t = min(t, len(gone), len(hessian) // size - len(gone))
        if not t:
            break
        other = _proposal(hessian, v, weight, size, gone, t)
        error = error_without(v, weight, size, other)
        if error < (1 - 1e-9) * best:
            gone, best = other, error
        else:
            t //= 2
    return gone


def error_without(v: Float[Tensor, "d d"], weight: Float[Tensor, "d_out d"], size: int, gone: list[int]) -> float:
    """(1): the error of a removed set when all others make up for it."""
    out = _columns(v, gone, size)
    return float(removal.exact(weight[:, out], v[out][:, out], len(out)).sum())


def returns(
    v: Float[Tensor, "d d"], weight: Float[Tensor, "d_out d"], size: int, gone: list[int]
) -> Float[Tensor, " gone"]:
    """(3): by how much the error falls when one of the removed groups comes back, for each of them."""
    out = _columns(v, gone, size)
    m = removal.inverse(v[out][:, out])
    return removal.exact(weight[:, out] @ m, m, size)


def _proposal(hessian: Tensor, v: Tensor, weight: Tensor, size: int, gone: list[int], t: int) -> list[int]:
    kept = sorted(set(range(len(hessian) // size)) - set(gone))
    w_kept, v_kept = removal.refitted(hessian, weight, _columns(v, kept, size))
    cheapest = removal.exact(w_kept, v_kept, size).argsort(stable=True)[:t]  # (2)
    more = gone + [kept[k] for k in cheapest.tolist()]
    dearest = returns(v, weight, size, more).argsort(descending=True, stable=True)[:t].tolist()  # (3)
    return [g for i, g in enumerate(more) if i not in dearest]


def _columns(v: Tensor, groups: list[int], size: int) -> Tensor:
    return removal.columns(torch.as_tensor(groups, dtype=torch.long, device=v.device), size)
