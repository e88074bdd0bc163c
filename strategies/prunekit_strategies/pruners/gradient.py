"""Gradient scores: what the loss would lose with a group or a weight, read off its derivatives in what goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import LayerProblem, check_choices
from prunekit.layer.candidates import Per
from prunekit.layer.problem import Producer
from prunekit_strategies.pruners.ranking import Ranking

Order = Literal["first", "second", "mix"]
Grain = Literal["fine", "coarse", "mixed"]
Mixing = Literal["attention", "maxima", "unit"]
Reduce = Literal["sum", "mean", "max", "prod", "first"]


@dataclass(frozen=True)
class Gradient(Ranking):
    """Keep the groups whose weights the dense model's loss L leans on, by a Taylor expansion at w = 0 from w.

        e     first  w g      second  w² F      mix  w g - ½ w² F        g = E[∂L/∂w], F = E[(∂L/∂w)²] over windows  (1)
        s_tg  fine   Σ |e|    coarse  |Σ e|                              over the weights of tensor t in group g     (2)
        u_g   reduce of s_tg over the tensors t: rows of the maps in front, then the layer's own columns             (3)
        mixed u = a_f z_f + a_c z_c   (a_f, a_c) = column means of softmax by rows (Z Zᵀ / √n),   Z = [z_f; z_c]     (4)
              of the fine u, and the coarse u of first order, over the layer's n groups: mixing `attention` z-scores,
              `maxima` each over its maximum
              u_g = α f_g + (1 - α) c_g   α = exp f_g / (exp f_g + exp c_g),   f, c over their means; `unit`         (5)

    Single weights, and n:m, score |e|; grain and reduce are of groups only. Both rows of z-scores have length √n, so
    that A in (4) is symmetric and a_f = a_c = ½ whatever the scores are: that form adapts to nothing but is the same in
    every unit of either score. `maxima` and `unit` weigh by the scores.

    Sources: LLM-Pruner (Ma et al. 2023, arXiv 2305.11627) for (1)-(3); its `vector` is order first, grain coarse.
    HyWIA (arXiv 2403.10799) for mixing both grains by attention; we did not find its equations, (4) and (5) are
    derived. Ours too: F stands for the Hessian's diagonal in both
    `second` and `mix`, and all calibration tokens are read where the paper takes 10 samples of 64. L is that of
    the dense model; it is not taken again when earlier layers are pruned. On a tie the lower id stays.
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups", "weights", "n:m"})

    order: Order = "first"
    grain: Grain = "fine"
    reduce: Reduce = "sum"
    mixing: Mixing = "attention"  # of the grain mixed
    per: Per = "layer"  # among which single weights compete
    refit: bool = False  # least-squares weights on what is kept; False: as they are

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gradient", "producers", *(("gram",) if self.refit else ())})

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        """u_g in float64: the change of L, in nats per token, as far as (1) sees it; for `mixed` without unit."""
        if self.grain != "mixed":
            return self._of_grain(layer, self.order, self.grain)
        f, c = self._of_grain(layer, self.order, "fine"), self._of_grain(layer, "first", "coarse")
        if self.mixing == "unit":
            f, c = (u / u.mean().clamp_min(torch.finfo(u.dtype).tiny) for u in (f, c))
            alpha = torch.sigmoid(f - c)
            return alpha * f + (1 - alpha) * c  # (5)
        both = torch.stack([f, c])
        largest = both.amax(1, keepdim=True)
        if self.mixing == "maxima":
            z, spread = both, largest
        else:
            z, spread = both - both.mean(1, keepdim=True), both.std(1, correction=0, keepdim=True)
        z = torch.where(spread > 1e-12 * largest, z / spread, 0)  # zeros where all groups are alike
        return (z @ z.T / layer.n_groups**0.5).softmax(1).mean(0) @ z  # (4)

    def _of_grain(self, layer: LayerProblem, order: Order, grain: Grain) -> Float[Tensor, " n_groups"]:
        """(2), (3)."""
        units = [e.reshape(layer.n_groups, -1) for e in self._tensors(layer, order)]
        return self._reduced(torch.stack([u.abs().sum(1) if grain == "fine" else u.sum(1).abs() for u in units]))

    def cells(self, layer: LayerProblem) -> Float[Tensor, "d_out d_in"]:
        return self._expanded(layer, self.order).abs()

    def _tensors(self, layer: LayerProblem, order: Order) -> list[Float[Tensor, "fibres _"]]:
        """(1) for every tensor, its rows in blocks by group."""
        return [*(self._expanded(producer, order) for producer in layer.producers), self._expanded(layer, order).T]

    def _expanded(self, linear: LayerProblem | Producer, order: Order) -> Tensor:
        w = linear.weight.double()
        if order == "first":
            return w * linear.require("gradient").double()
        curved = w.square() * linear.require("fisher").double()
        return curved if order == "second" else w * linear.require("gradient").double() - curved / 2

    def _reduced(self, scores: Float[Tensor, "tensors n_groups"]) -> Float[Tensor, " n_groups"]:  # (3)
        if self.reduce == "first":
            return scores[0]
        return {"sum": scores.sum, "mean": scores.mean, "max": scores.amax, "prod": scores.prod}[self.reduce](0)


@dataclass(frozen=True)
class LLMPruner(Gradient):
    """First-order scores of single weights, added up over everything that goes with a group.

    Source: Ma et al. 2023 (arXiv 2305.11627), element-wise order `first`, reduction `sum`. Its recovery by LoRA is a
    finisher; that it spares the first and last layers is an allocator's part.
    """


@dataclass(frozen=True)
class HyWIA(Gradient):
    """Importance of single weights and of whole groups, mixed by attention between the two.

    Source: HyWIA (arXiv 2403.10799). The fine one is of second order, Σ |w g - ½ w² F|, the coarse one of first,
    |Σ w g|, as LLM-Pruner has them for single weights and for vectors; the mixture is derived, see `Gradient`.
    """

    order: Order = "mix"
    grain: Grain = "mixed"
