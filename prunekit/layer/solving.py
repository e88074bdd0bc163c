"""Positive definite matrices: their factors, solutions and inverses, also where rounding has the last word.

A has a Cholesky factor in floating point, whatever the order of its columns and of the sums, when the smallest
eigenvalue of D^-½ A D^-½, D = diag A, is above some n·ε (Demmel 1989; Higham 2002, theorem 10.7). By interlacing
the same is true of every principal sub-matrix. Below that the processor's rounding decides, and fails somewhere.
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from torch import Tensor

_SAFETY = 64  # times n·ε: for n ≤ 63 a proof; the worst that was found, rank one and n = 4000, takes 8
_MOST = 1e-2  # share of itself that a diagonal is raised by; beyond that the matrix is not what it should be
_log = logging.getLogger(__name__)


def margin(n: int, dtype: torch.dtype = torch.float64) -> float:
    """c such that (n, n) matrices A with A - c diag A ≥ 0 have Cholesky factors, and so have all parts of them.

    A share of the diagonal, so that columns may be of very different size.
    """
    return _SAFETY * n * torch.finfo(dtype).eps


def factored(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """L lower, L Lᵀ = A; of A + c diag A with the least c = margin, 10 margin, … that has a factor where A has none.

    Every matrix of a batch has its own c, 0 as a rule, and `torch.linalg.cholesky`'s bits then. A c above 0 is a line
    in the log.

    Raises:
        ValueError: no c up to 0.01 does.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return factor
    n, shape = matrix.shape[-1], matrix.shape
    every, found = matrix.reshape(-1, n, n), factor.reshape(-1, n, n).clone()
    missing, share = info.reshape(-1).nonzero().flatten(), margin(n, matrix.dtype)
    while share <= _MOST:
        raised = every[missing]
        own = raised.diagonal(dim1=1, dim2=2).clamp_min(0)
        mean = own.mean(1, keepdim=True)
        own = torch.where(own > 0, own, torch.where(mean > 0, mean, 1))  # of what is zero there is no share
        raised.diagonal(dim1=1, dim2=2).add_(share * own)
        factor, info = torch.linalg.cholesky_ex(raised)
        found[missing[info == 0]] = factor[info == 0]
        if count := int((info == 0).sum()):
            _log.info(
                "%d of %d (%d, %d) matrices solved with %.1e of their diagonal added", count, len(every), n, n, share
            )
        missing = missing[info != 0]
        if not len(missing):
            return found.reshape(shape)
        share *= 10
    raise ValueError(
        f"{len(missing)} of {len(every)} ({n}, {n}) matrices have no Cholesky factor, even with {share / 10:.0e} of "
        "their diagonal added: they are no second moments, or not finite; raise `damping`, or take more tokens"
    )


def solved(matrix: Float[Tensor, "*batch n n"], right: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n m"]:
    """A⁻¹ right, with A as `factored` has it."""
    return torch.cholesky_solve(right, factored(matrix))


def inverted(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """A⁻¹, with A as `factored` has it."""
    return torch.cholesky_inverse(factored(matrix))
