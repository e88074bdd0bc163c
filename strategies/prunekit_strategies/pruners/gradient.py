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
Reduce = Literal["sum", "mean", "max", "prod", "first"]


@dataclass(frozen=True)
class Gradient(Ranking):
    """Keep the groups whose weights the dense model's loss L leans on, by a Taylor expansion at w = 0 from w.

        e     first  w g      second  w² F      mix  w g - ½ w² F        g = E[∂L/∂w], F = E[(∂L/∂w)²] over windows  (1)
        s_tg  fine   Σ |e|    coarse  |Σ e|                              over the weights of tensor t in group g     (2)
        u_g   reduce of s_tg over the tensors t: rows of the maps in front, then the layer's own columns             (3)
        mixed u_g = α f_g + (1 - α) c_g,   α = exp f_g / (exp f_g + exp c_g),   f, c: fine and coarse u_g, each
              divided by its mean over the layer's groups                                                            (4)

    Single weights, and n:m, score |e|; grain and reduce are of groups only.

    Sources: LLM-Pruner (Ma et al. 2023, arXiv 2305.11627) for (1)-(3); its `vector` is order first, grain coarse.
    HyWIA (arXiv 2403.10799) for (4), whose exact form is ours. Ours too: F stands for the Hessian's diagonal in both
    `second` and `mix`, and all calibration tokens are read where the paper takes 10 samples of 64. L is that of
    the dense model; it is not taken again when earlier layers are pruned. On a tie the lower id stays.
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups", "weights", "n:m"})

    order: Order = "first"
    grain: Grain = "fine"
    reduce: Reduce = "sum"
    per: Per = "layer"  # among which single weights compete
    refit: bool = False  # least-squares weights on what is kept; False: as they are

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gradient", "producers", *(("gram",) if self.refit else ())})

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        """u_g in float64: the change of L, in nats per token, as far as (1) sees it; for `mixed` without unit."""
        fine, coarse = [], []
        for e in self._tensors(layer):
            units = e.reshape(layer.n_groups, -1)
            fine.append(units.abs().sum(1))
            coarse.append(units.sum(1).abs())  # (2)
        f, c = self._reduced(torch.stack(fine)), self._reduced(torch.stack(coarse))
        if self.grain != "mixed":
            return f if self.grain == "fine" else c
        f, c = (u / u.mean().clamp_min(torch.finfo(u.dtype).tiny) for u in (f, c))
        alpha = torch.sigmoid(f - c)
        return alpha * f + (1 - alpha) * c  # (4)

    def cells(self, layer: LayerProblem) -> Float[Tensor, "d_out d_in"]:
        return self._expanded(layer).abs()

    def _tensors(self, layer: LayerProblem) -> list[Float[Tensor, "fibres _"]]:
        """(1) for every tensor, its rows in blocks by group."""
        return [*map(self._expanded, layer.producers), self._expanded(layer).T]

    def _expanded(self, linear: LayerProblem | Producer) -> Tensor:
        w = linear.weight.double()
        if self.order == "first":
            return w * linear.require("gradient").double()
        curved = w.square() * linear.require("fisher").double()
        return curved if self.order == "second" else w * linear.require("gradient").double() - curved / 2

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
    """Fine and coarse importance mixed group by group, by a softmax over the two.

    Source: HyWIA (arXiv 2403.10799).
    """

    grain: Grain = "mixed"
