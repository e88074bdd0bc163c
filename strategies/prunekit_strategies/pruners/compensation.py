"""What is left of a layer when single weights go: two ways to the best weights under a mask, and one that is cheaper.

No method, but what the solvers of single weights share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, Need, check_choices, factored

Aim = Literal["own", "dense", "stream"]
NEEDS: Mapping[Aim, Sequence[str]] = {"own": (), "dense": ("cross",), "stream": ("cross", "drift")}
"""Its own output on what it will see, the dense model's output, or its residual stream; as in `obs`."""

SINGLE = frozenset({"weights", "n:m"})

Choose = Callable[[slice, Float[Tensor, "d_out width"], Float[Tensor, "width width"]], Bool[Tensor, "d_out width"]]
"""The mask of some columns, from their present weights and the upper factor U of their inverse Hessian, V = Uᵀ U."""


def needed(aim: Aim, mask: LocalPruner | None) -> frozenset[Need]:
    """What a solver with this aim reads, and the pruner whose masks it takes."""
    return frozenset({"gram", *NEEDS[aim]}) | (frozenset() if mask is None else mask.needs)


def aimed(layer: LayerProblem, aim: Aim) -> LayerProblem:
    """The layer without the moments this aim does not ask for."""
    unasked = {"cross", "drift"} - {*NEEDS[aim]}
    return replace(layer, **dict.fromkeys(unasked)) if unasked else layer


def reached(layer: LayerProblem) -> Float[Tensor, " d_in"]:
    """1 for inputs that anything ever reaches; 0 for the others, whose weights cost nothing whatever the ridge says."""
    return (layer.gram.diagonal() > 0).double()


def check(solver: LocalPruner, mask: LocalPruner | None) -> None:
    """Refuse an option that is not among its choices, and a pruner of masks that knows no single weights."""
    check_choices(solver)
    if mask is not None and not mask.structures >= SINGLE:
        raise ValueError(f"{type(mask).__name__} chooses no single weights; it knows {', '.join(mask.structures)}")


def given(layer: LayerProblem, pruner: LocalPruner, keeps: Sequence[int]) -> list[Bool[Tensor, "d_out d_in"]]:
    """The masks of another pruner, which is shown what it needs and no more."""
    return [candidate.weight != 0 for candidate in pruner.prune(layer.restricted_to(pruner.needs), keeps)]


def factor(layer: LayerProblem) -> Float[Tensor, "d_in d_in"]:
    """U upper, Uᵀ U = (H + λI)⁻¹: row j holds the OBS update of column j by the columns behind it, times U_jj."""
    backwards = factored(layer.hessian.flip(0, 1)).flip(0, 1)  # A upper, H = A Aᵀ
    return torch.linalg.solve_triangular(backwards, torch.eye(layer.d_in).to(backwards), upper=True)


def swept(
    target: Float[Tensor, "d_out d_in"], u: Float[Tensor, "d_in d_in"], choose: Choose, *, step: int, width: int
) -> tuple[Float[Tensor, "d_out d_in"], Bool[Tensor, "d_out d_in"]]:
    """From the first column to the last, zero what is not kept; the columns behind it make up for it.

        e = w_j / U_jj  where weight j goes,     w_:, ← w_: - e U_j:                                     (1)

    `choose` is asked for `step` columns at a time, when the sweep reaches them. (1) reaches `width` columns at
    once, the rest in one product per block of as many; that changes nothing but the time it takes.
    """
    w, d_in = target.clone(), target.shape[1]
    mask = torch.ones_like(w, dtype=torch.bool)
    width = max(width // step, 1) * step
    for start in range(0, d_in, width):
        stop = min(start + width, d_in)
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            if j % step == 0:
                here = slice(j, min(j + step, d_in))
                mask[:, here] = choose(here, w[:, here], u[here, here])
            errors[:, j - start] = torch.where(mask[:, j], 0, w[:, j]) / u[j, j]
            w[:, j:stop] -= errors[:, j - start, None] * u[j, j:stop]  # (1)
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return torch.where(mask, w, 0), mask


def conjugate(
    hessian: Float[Tensor, "d_in d_in"],
    target: Float[Tensor, "d_out d_in"],
    mask: Bool[Tensor, "d_out d_in"],
    *,
    steps: int = 100,
    tolerance: float = 1e-10,
    start: Float[Tensor, "d_out d_in"] | None = None,
) -> Float[Tensor, "d_out d_in"]:
    """The least squares of every row on its own support, by conjugate gradients on all rows at once.

        minimise tr (W* - Y) H (W* - Y)ᵀ over Y = Y ∘ mask; Jacobi preconditioner diag H; from `start`, or W* ∘ mask

    A row ends when its residual is `tolerance` of that of zeros, or where rounding leaves no way down.
    Source: ALPS (Meng et al. 2024, arXiv 2406.07831), section 3.3.
    """
    scale = hessian.diagonal()
    reached = torch.where(mask, target @ hessian, 0)
    floor = tolerance**2 * (reached.square() / scale).sum(1)
    y = torch.where(mask, target if start is None else start, 0)
    r = torch.where(mask, reached - y @ hessian, 0)
    z = r / scale
    p, rho = z, (r * z).sum(1)
    for _ in range(steps):
        q = torch.where(mask, p @ hessian, 0)
        curve = (p * q).sum(1)
        alive = (rho > floor) & (curve > 0)
        if not bool(alive.any()):
            break
        alpha = torch.where(alive, rho / curve, 0)[:, None]
        y, r = y + alpha * p, r - alpha * q
        z = r / scale
        before, rho = rho, (r * z).sum(1)
        p = z + torch.where(alive, rho / before, 0)[:, None] * p
    return y


def best(
    layer: LayerProblem,
    mask: Bool[Tensor, "d_out d_in"],
    *,
    exact: int,
    steps: int,
    start: Float[Tensor, "d_out d_in"] | None = None,
) -> Candidate:
    """The best weights under a mask: solved up to `exact` inputs, by `steps` conjugate gradients beyond."""
    if layer.d_in <= exact or bool(mask.all()):
        return layer.refitted_rows(mask)
    fitted = conjugate(layer.hessian, layer.target, mask, steps=steps, start=start)
    return Candidate(None, layer.rounded(fitted))
