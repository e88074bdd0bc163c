"""Removing groups one after another: what each one costs, and how the others make up for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from prunekit import factored, inverted, solved
from prunekit.layer.replay import Replayed

Price = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(W (d_out, left), V (left, left), columns that are left (left,)) -> what each group's removal costs (groups,)."""

_PENDING = 64  # removals held back before they are multiplied into V and A: what fits a cache
_DENSE = 7 / 8  # share of columns that are left where those that are gone are not worth the move
_DENSE_ON_GPU = 1 / 2  # there a move is also a graph anew: on paper as much as is saved, not measured
_SPENT = 1e-10  # below this share of its first value V_jj is rounding, not information


def exact(w: Float[Tensor, "d_out d"], v: Float[Tensor, "d d"], size: int) -> Float[Tensor, " n"]:
    """tr[W_P (V_PP)⁻¹ W_Pᵀ] of every group: by how much the error grows when the others make up for it."""
    columns = w.T.unflatten(0, (-1, size))  # W_Pᵀ: (n, size, d_out)
    return torch.linalg.solve_triangular(_roots(v, size), columns, upper=False).square().sum((1, 2))


def grouped_cholesky(w: Float[Tensor, "d_out d"], v: Float[Tensor, "d d"], size: int) -> Float[Tensor, " n"]:
    """Σ_j ‖w_j‖² / B_jj² of every group, B Bᵀ = V_PP: columns leave in order, their weights stay as they were."""
    return by_group(w.square().sum(0) / _roots(v, size).diagonal(dim1=1, dim2=2).flatten().square(), size)


def diagonal(w: Float[Tensor, "d_out d"], v: Float[Tensor, "d d"], size: int) -> Float[Tensor, " n"]:
    """Σ_j ‖w_j‖² / V_jj of every group: as if its columns did not know of each other."""
    return by_group(w.square().sum(0) / v.diagonal(), size)


COMPENSATED: Mapping[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "exact": exact,
    "grouped-cholesky": grouped_cholesky,
    "diagonal": diagonal,
}


def remove_groups(
    hessian: Float[Tensor, "d d"],
    weight: Float[Tensor, "d_out d"],
    size: int,
    picks: int,
    price: Price,
    step: Callable[[int], int],
) -> list[int]:
    """The first `picks` groups to remove, in order; `step` says how many go at once while so many are left.

    A step takes the cheapest groups as they are priced before it, the cheapest first, and removes them together:

        W ← W - W_P (V_PP)⁻¹ V_P:                                               (1)
        V ← V - V_:P (V_PP)⁻¹ V_P:                                              (2)
    """
    left = torch.arange(len(hessian), device=hessian.device)  # columns
    w, v = weight.clone(), inverse(hessian)
    floor = _SPENT * v.diagonal()
    order: list[int] = []
    while True:
        cheapest = price(w, v, left).argsort(stable=True)[: step(len(left) // size)]
        order += (left[cheapest * size] // size).tolist()
        if len(order) >= picks:
            return order[:picks]
        out = columns(cheapest, size)
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill(0, out, False)
        gain = solved(v[out][:, out], v[out])  # (V_PP)⁻¹ V_P:
        w.addmm_(w[:, out], gain, alpha=-1)  # (1)
        v.addmm_(v[:, out], gain, alpha=-1)  # (2)
        left, floor, w, v = left[stays], floor[stays], w[:, stays], v[stays][:, stays]
        if bool((v.diagonal() < floor).any()):
            w, v = refitted(hessian, weight, left)
            floor = _SPENT * v.diagonal()


def remove_columns(hessian: Float[Tensor, "d d"], weight: Float[Tensor, "d_out d"], picks: int) -> list[int]:
    """The first `picks` columns to remove, in order; the same as `remove_groups` one by one, but fast.

    The exact price reads W through A = WᵀW alone: A_jj / V_jj. With r = V_p: / V_pp, y = A_p: and
    x = y - ½ A_pp r, removing p is two symmetric corrections of low rank:

        V ← V - V_pp rᵀr                                                        (3)
        A ← A - xᵀr - rᵀx                                                       (4)

    Only the diagonals follow at once. (3) and (4) wait until `_PENDING` of them make a matrix product worth it; after
    them rows and columns of p are zero, and stay where they are until an eighth of all is gone, on a GPU a half. There
    the removals that wait together are one launch.
    """
    left = torch.arange(len(hessian), device=hessian.device)
    v, a = inverse(hessian), weight.T @ weight
    floor, gone, live = _SPENT * v.diagonal(), v.new_zeros(len(v)), len(v)
    pending, order = _Pending(v, a, floor, gone), list[int]()
    while len(order) < picks:
        n, steps = len(left), min(_PENDING, picks - len(order))
        order += left[pending.chosen(steps)].tolist()
        if len(order) == picks:
            break
        pending.apply()
        live, spent = live - steps, bool((v.diagonal() + gone < floor).any())
        if not spent and live > (_DENSE_ON_GPU if v.is_cuda else _DENSE) * n:
            continue
        stays = (gone == 0).nonzero().flatten()
        left, floor, gone = left[stays], floor[stays], gone[stays]
        if spent:
            w, v = refitted(hessian, weight, left)
            a = w.T @ w
            floor = _SPENT * v.diagonal()
        else:
            # same as: m[stays][:, stays]
            v, a = (m[stays].gather(1, stays.expand(len(stays), -1)) for m in (v, a))
        pending = _Pending(v, a, floor, gone)
    return order


class _Pending:
    """Up to `_PENDING` removals from the same V and A; its tensors stay where they are, so that a GPU can replay them.

    V, A, floor of V_jj, and ∞ for columns that are gone: those of the caller, changed in place.
    """

    def __init__(self, v: Tensor, a: Tensor, floor: Tensor, gone: Tensor) -> None:
        self.v, self.a, self.floor, self.gone = v, a, floor, gone
        n, most = len(v), _PENDING
        self.v_jj, self.a_jj = v.new_empty(n), v.new_empty(n)
        self.rx, self.delta = v.new_empty(most, 2, n), v.new_empty(most, 1)  # r and x of every removal that is pending
        self.ids = torch.empty(most, dtype=torch.long, device=v.device)
        self._all = Replayed(partial(self._choose, most), v.device)

    def chosen(self, steps: int) -> Int64[Tensor, " steps"]:
        """The next columns to remove."""
        if steps == _PENDING:
            self._all()
        else:
            self._choose(steps)
        return self.ids[:steps]

    def apply(self) -> None:
        """Multiply all `_PENDING` into V and A."""
        rx, r = self.rx, self.rx[:, 0]
        self.v.addmm_((self.delta * r).T, r, alpha=-1)  # (3)
        self.a.addmm_(rx.flatten(0, 1).T, rx.flip(1).flatten(0, 1), alpha=-1)  # (4), both products in one

    def _choose(self, steps: int) -> None:
        """As `chosen`, on these tensors alone; nothing waits for the device."""
        v, a, v_jj, a_jj, rx, delta = self.v, self.a, self.v_jj, self.a_jj, self.rx, self.delta
        v_jj.copy_(v.diagonal())
        torch.add(a.diagonal(), self.gone, out=a_jj)
        for i in range(steps):
            p = (a_jj.clamp_min(0) / torch.maximum(v_jj, self.floor)).argmin(keepdim=True)  # stays on the device
            past = rx[:i].flatten(0, 1)  # (2i, n)
            r_p, x_p = past[:, p].view(i, 2).split(1, 1)
            of_v, of_a = torch.cat([delta[:i] * r_p, torch.zeros_like(r_p)], 1), torch.cat([x_p, r_p], 1)
            row = torch.stack([of_v.flatten(), of_a.flatten()]) @ past  # pending parts of (3), (4): (2, n)
            (t,), (y,) = v[p] - row[:1], a[p] - row[1:]  # V_p: and A_p:
            delta[i] = t[p]
            r = torch.div(t, delta[i], out=rx[i, 0])
            x = torch.sub(y, 0.5 * y[p] * r, out=rx[i, 1])
            v_jj.addcmul_(t, r, value=-1)  # (3)
            a_jj.addcmul_(x, r, value=-2).index_fill_(0, p, torch.inf)  # (4)
            self.gone.index_fill_(0, p, torch.inf)
            self.ids[i] = p[0]


def remove_masked(hessian: Float[Tensor, "d d"], weight: Float[Tensor, "d_out d"], size: int, picks: int) -> list[int]:
    """The first `picks` groups to remove, in order, when nothing makes up for them.

    With the columns P at zero the error is Σ_{i,j ∈ P} Q_ij, Q = (WᵀW) ∘ H; group g adds Q_gg + 2 Σ_{h gone} Q_gh.
    """
    q = masked_error(hessian, weight, size)
    rise, gone = q.diagonal().clone(), q.new_zeros(len(q))
    order = torch.empty(picks, dtype=torch.long, device=q.device)
    for i in range(picks):
        p = (rise + gone).argmin(keepdim=True)  # stays on the device
        order[i] = p[0]
        gone.index_fill_(0, p, torch.inf)
        rise += 2 * q[p][0]
    return order.tolist()


def masked_error(hessian: Float[Tensor, "d d"], weight: Float[Tensor, "d_out d"], size: int) -> Float[Tensor, "n n"]:
    """Q = (WᵀW) ∘ H summed over pairs of groups: qᵀQq is the error of setting the groups with q = 1 to zero."""
    q = (weight.T @ weight) * hessian
    return q.unflatten(0, (-1, size)).unflatten(2, (-1, size)).sum((1, 3))


def refitted(
    hessian: Float[Tensor, "d d"], weight: Float[Tensor, "d_out d"], left: Int64[Tensor, " k"]
) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, "k k"]]:
    """W and V with only the columns `left`, from H itself: where (1) and (2) lead without rounding."""
    v = inverse(hessian[left][:, left])
    return weight @ hessian[:, left] @ v, v


def columns(groups: Int64[Tensor, " n"], size: int) -> Int64[Tensor, " columns"]:
    """The columns of some groups, in the order given."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def inverse(hessian: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Of a positive definite matrix."""
    return inverted(hessian)


def by_group(x: Float[Tensor, " d"], size: int) -> Float[Tensor, " n"]:
    """Sums over the columns of every group."""
    return x.unflatten(0, (-1, size)).sum(1)


def _roots(v: Float[Tensor, "d d"], size: int) -> Float[Tensor, "n size size"]:
    """The Cholesky factor of every group's V_PP."""
    blocks = v.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2)  # (size, size, n)
    return factored(blocks.permute(2, 0, 1))
