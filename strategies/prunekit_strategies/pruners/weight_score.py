"""Scores of single weights from more than their own size: their row's, their column's, their output's direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import LayerProblem, check_choices
from prunekit.layer.candidates import Per
from prunekit.plugins.pruner import Within
from prunekit_strategies.pruners.ranking import Ranking

Shape = Literal["identity", "sqrt", "square", "exp", "log", "sigmoid", "softmax", "one"]
Share = Literal["one", "row", "column", "row+column", "sum", "mean", "frobenius"]

SHAPES: Mapping[Shape, Callable[[Tensor], Tensor]] = {
    "identity": lambda u: u,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "exp": lambda u: torch.exp(u.clamp_max(300)),  # finite, products included
    "log": torch.log1p,
    "sigmoid": torch.sigmoid,
    "softmax": lambda u: u.softmax(-1),
    "one": torch.ones_like,
}
SHARES: Mapping[Share, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "row": lambda u: u.sum(-1, keepdim=True),
    "column": lambda u: u.sum(0, keepdim=True),
    "row+column": lambda u: u.sum(-1, keepdim=True) + u.sum(0, keepdim=True),
    "sum": torch.sum,
    "mean": torch.mean,
    "frobenius": torch.linalg.norm,
}


class WeightScore(Ranking):
    """A score of single weights; groups have none."""

    structures: ClassVar[frozenset[str]] = frozenset({"weights", "n:m"})


@dataclass(frozen=True)
class RIA(WeightScore):
    """Relative importance: a weight's share of its row and of its column, times its input.

        s_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) x_j^a            x_j root mean square over tokens

    Source: Zhang et al. 2024, Plug-and-Play (ICLR), with a = ½; the weights of a map compete with each other, as in the
    released code unless told, or within their rows, `per: row`. The permutation of channels before n:m is not here.
    """

    activation_power: float = 0.5  # a
    per: Per = "layer"
    refit: bool = False  # least-squares weights on what is kept; False: as they are
    within: Within = "block"  # inputs behind the pruned maps of the layer's own block, or behind its dense ones

    def __post_init__(self) -> None:
        check_choices(self)
        if self.activation_power < 0:
            raise ValueError(f"activation_power ≥ 0 is needed, not {self.activation_power}")

    def cells(self, layer: LayerProblem) -> Float[Tensor, "d_out d_in"]:
        w = layer.weight.double().abs()
        return (_over(w, w.sum(0)) + _over(w, w.sum(1, keepdim=True))) * _rms(layer) ** self.activation_power


@dataclass(frozen=True)
class ZPruner(WeightScore):
    """A weight's size among its row and its column, both standardised over the layer, times its input.

        R = W_ij / ‖W_i:‖₂,    C = W_ij / ‖W_:j‖₂,    z(·) = (· - mean) / std over the layer
        ρ = share of weights with |W_ij| < 0.1 mean |W|,    α = 0.7 (1 - 0.3 ρ)
        s_ij = (α |z(R)|³ + (1 - α) |z(C)|³) x_j^1.5                        x_j root mean square over tokens

    Source: Z-Pruner (arXiv 2508.15828), over the whole map as in the released code unless told. Ours: where all of R or
    of C are alike, they have no say. SparseGPT's update for this mask is `{name: sparsegpt, mask: z-pruner}`.
    """

    per: Per = "layer"
    refit: bool = False  # least-squares weights on what is kept; False: as they are
    within: Within = "block"  # inputs behind the pruned maps of the layer's own block, or behind its dense ones

    def __post_init__(self) -> None:
        check_choices(self)

    def cells(self, layer: LayerProblem) -> Float[Tensor, "d_out d_in"]:
        w = layer.weight.double()
        small = (w.abs() < 0.1 * w.abs().mean()).double().mean()  # ρ
        alpha = 0.7 * (1 - 0.3 * small)
        rows = _standard(_over(w, w.norm(dim=1, keepdim=True))).abs() ** 3
        columns = _standard(_over(w, w.norm(dim=0))).abs() ** 3
        return (alpha * rows + (1 - alpha) * columns) * _rms(layer) ** 1.5


@dataclass(frozen=True)
class OptiShear(WeightScore):
    """OptiShear's family of metrics: a function and a share of the weights times a function and a share of the inputs.

        s_ij = f_w(u_ij) / c_w(u) · f_x(v_j) / c_x(v),        u = |W| / mean |W|,    v_j = x_j / mean x

        f    identity, sqrt, square, exp, log (of 1 + u), sigmoid, softmax (over columns), one
        c    one, row, column, row+column, sum, mean, frobenius; of the inputs what is not per weight

    x_j is the root mean square of input j over tokens. With identity and one it is Wanda; the paper searches for the
    functions by their losses, as `prunekit tune` does over these options.

    Source: OptiShear (arXiv 2502.10735), which takes f of the bare |W| and ‖x‖. Ours: u and v, so that no
    choice depends on units, and log of 1 + u, so that every metric grows with both.
    """

    weights: Shape = "identity"  # f_w
    weight_share: Share = "one"  # c_w
    inputs: Shape = "identity"  # f_x
    input_share: Share = "one"  # c_x
    per: Per = "row"
    refit: bool = False  # least-squares weights on what is kept; False: as they are
    within: Within = "block"  # inputs behind the pruned maps of the layer's own block, or behind its dense ones

    def __post_init__(self) -> None:
        check_choices(self)
        if self.weights == self.inputs == "one":
            raise ValueError("with weights and inputs one, all weights score alike; choose a function of either")

    def cells(self, layer: LayerProblem) -> Float[Tensor, "d_out d_in"]:
        w = layer.weight.double().abs()
        u, v = _over(w, w.mean()), _rms(layer)[None]
        v = _over(v, v.mean())
        scored = _over(SHAPES[self.weights](u), SHARES[self.weight_share](u))
        return scored * _over(SHAPES[self.inputs](v), SHARES[self.input_share](v))


def _rms(layer: LayerProblem) -> Float[Tensor, " d_in"]:
    return layer.gram.diagonal().double().clamp_min(0).sqrt()


def _over(values: Tensor, total: Tensor) -> Tensor:
    """values / total, and 0 where the total is."""
    return torch.where(total > 0, values / torch.where(total > 0, total, 1), 0)


def _standard(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over all; zeros where all are alike."""
    spread = values - values.mean()
    return _over(spread, spread.square().mean().sqrt())
