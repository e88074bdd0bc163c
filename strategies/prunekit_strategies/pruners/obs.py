"""Optimal brain surgeon on groups: remove the cheapest group, let the others make up for it, repeat.

One walk from dense to the smallest count passes every larger one, so all rungs of a ladder cost one walk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner

Aim = Literal["own", "dense", "stream"]
NEEDS: Mapping[Aim, Sequence[str]] = {"own": (), "dense": ("cross",), "stream": ("cross", "drift")}

_PENDING = 64  # removals held back before they are multiplied into V and A: what fits a cache


@dataclass(frozen=True)
class OBS(LocalPruner):
    """Greedy structured optimal brain surgeon, one group per step, with exact updates.

    W (d_out, d_in) starts at W*, V = (H + λI)⁻¹ (d_in, d_in). Removing the columns P of a group:

        rise       tr[W_P (V_PP)⁻¹ W_Pᵀ]          exact growth of the error      (1)
        weights    W ← W - W_P (V_PP)⁻¹ V_P:      the others compensate          (2)
        inverse    V ← V - V_:P (V_PP)⁻¹ V_P:     = (H_KK)⁻¹ on what is left     (3)

    Source: ZipLM (Kurtic et al. 2023, arXiv 2302.04089) for one group per step; Hassibi & Stork 1993 for (1)-(3).
    Ours: the walk only finds the order, all weights come from one Cholesky factor of H in that order
    (`LayerProblem.nested`), because every correct compensation of a set is its least-squares refit.

    What W* is depends on the aim, for dense inputs x, inputs x̂ behind pruned layers, and δ, what the residual
    stream has lost before this sub-layer is added to it:

        own       W x̂        W* = W
        dense     W x        W* = W (G + λI) (H + λI)⁻¹              (4)
        stream    W x + δ    W* = (W (G + λI) + D) (H + λI)⁻¹        (5)

    with G = E[x x̂ᵀ] and D = E[δ x̂ᵀ]. (4) is error correction as in OSSCAR (arXiv 2403.12983); (5) is ours: every
    layer also makes up for what earlier ones could not, as far as a linear map of its inputs can.

    Groups that nothing ever reaches go first. On a tie the lower id stays.
    """

    aim: Aim = "own"  # its own output on what it will see, the dense model's output, or its residual stream

    def __post_init__(self) -> None:
        if self.aim not in NEEDS:
            raise ValueError(f"aim is one of {', '.join(NEEDS)}, not {self.aim!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", *NEEDS[self.aim]})

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        unasked = {"cross", "drift"} - self.needs
        layer = replace(layer, **dict.fromkeys(unasked)) if unasked else layer
        smallest = min((k for k in keeps if k > 0), default=layer.n_groups)  # nothing is decided on the way to 0
        return layer.nested(_ranking(layer, smallest)).candidates(keeps)


def _ranking(layer: LayerProblem, stop: int) -> list[int]:
    """Group ids, the last to be removed first; in id order before position `stop`, where the walk ends."""
    reached = layer.group_sum(layer.gram.diagonal()) > 0
    dead = (~reached).nonzero().flatten().tolist()
    live = reached.nonzero().flatten().flip(0).tolist()  # downwards: the first minimum is the highest id
    picks = max(len(live) - stop, 0)
    gone: list[int] = []
    if picks:
        columns = layer.columns(live)
        hessian = layer.hessian[columns][:, columns]
        weight = layer.target[:, columns] * (layer.gram.diagonal()[columns] > 0)  # dead columns are free
        size = layer.group_size
        walk = remove_columns(hessian, weight, picks) if size == 1 else remove_blocks(hessian, weight, size, picks)
        gone = [live[p] for p in walk]
    return sorted(set(live) - set(gone)) + gone[::-1] + dead


def remove_blocks(hessian: Float[Tensor, "d d"], weight: Float[Tensor, "d_out d"], size: int, picks: int) -> list[int]:
    """The first `picks` groups to remove, in order; equations (1)-(3) as they stand."""
    left = list(range(len(hessian) // size))
    w, v = weight.clone(), _inverse(hessian)
    order: list[int] = []
    for _ in range(picks):
        blocks = v.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2)  # V_PP: (size, size, n)
        root = torch.linalg.cholesky(blocks.permute(2, 0, 1))  # (n, size, size)
        columns = w.T.unflatten(0, (-1, size))  # W_Pᵀ: (n, size, d_out)
        rise = torch.linalg.solve_triangular(root, columns, upper=False).square().sum((1, 2))  # (1)
        p = int(rise.argmin())
        order.append(left.pop(p))

        out = slice(p * size, (p + 1) * size)
        gain = torch.cholesky_solve(v[out], root[p])  # (V_PP)⁻¹ V_P:
        w -= w[:, out].clone() @ gain  # (2)
        v -= v[:, out].clone() @ gain  # (3)
        w = torch.cat([w[:, : out.start], w[:, out.stop :]], 1)
        v = torch.cat([v[: out.start], v[out.stop :]])
        v = torch.cat([v[:, : out.start], v[:, out.stop :]], 1)
    return order


def remove_columns(hessian: Float[Tensor, "d d"], weight: Float[Tensor, "d_out d"], picks: int) -> list[int]:
    """The first `picks` columns to remove, in order; the same as `remove_blocks` with size 1, but fast.

    (1) reads W through A = WᵀW alone: rise_j = A_jj / V_jj. With r = V_p: / V_pp, y = A_p: and
    x = y - ½ A_pp r, removing p is two symmetric corrections of low rank:

        V ← V - V_pp rᵀr                                                        (6)
        A ← A - xᵀr - rᵀx                                                       (7)

    Only the diagonals follow at once. (6) and (7) wait until `_PENDING` of them make a matrix product worth it.
    """
    left = torch.arange(len(hessian), device=hessian.device)
    v, a = _inverse(hessian), weight.T @ weight
    floor = 1e-10 * v.diagonal()  # below this V_jj is rounding, not information
    order: list[int] = []
    while len(order) < picks:
        n, steps = len(left), min(_PENDING, picks - len(order))
        r, x, delta = v.new_empty(steps, n), v.new_empty(steps, n), v.new_empty(steps, 1)
        chosen = torch.empty(steps, dtype=torch.long, device=v.device)
        v_jj, a_jj, gone = v.diagonal().clone(), a.diagonal().clone(), v.new_zeros(n)
        for i in range(steps):
            rise = a_jj.clamp_min(0) / torch.maximum(v_jj, floor) + gone  # (1)
            p = rise.argmin(keepdim=True)  # stays on the device
            r_p, x_p = r[:i, p], x[:i, p]  # (i, 1)
            row = torch.cat([delta[:i] * r_p, x_p], 1).T @ r[:i]  # pending parts of (6), (7): (2, n)
            t = v[p] - row[:1]  # V_p:
            y = a[p] - row[1:] - r_p.T @ x[:i]  # A_p:
            delta[i] = t[0, p]
            r[i] = t / delta[i]
            x[i] = y - 0.5 * y[0, p] * r[i]
            v_jj -= delta[i] * r[i].square()  # (6)
            a_jj -= 2 * x[i] * r[i]  # (7)
            gone[p] = torch.inf
            chosen[i] = p[0]
        order += left[chosen].tolist()
        if len(order) == picks:
            break
        v.addmm_((delta * r).T, r, alpha=-1)  # (6)
        a.addmm_(x.T, r, alpha=-1).addmm_(r.T, x, alpha=-1)  # (7)
        stays = (gone == 0).nonzero().flatten()
        left, floor = left[stays], floor[stays]
        v, a = v[stays][:, stays], a[stays][:, stays]
        if bool((v.diagonal() < floor).any()):
            v = _inverse(hessian[left][:, left])
            w = weight @ hessian[:, left] @ v
            a = w.T @ w
            floor = 1e-10 * v.diagonal()
    return order


def _inverse(hessian: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))
