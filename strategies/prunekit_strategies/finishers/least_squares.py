"""The linear maps that were pruned, solved anew behind the layers that are finished already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit import Finisher, LayerProblem, Workpiece, check_choices, solved
from prunekit.calibration.twin import Aim, SubLayer, Twin
from prunekit.models.classes import LowRank
from prunekit_strategies.pruners.compensation import best


@dataclass(frozen=True)
class LeastSquares(Finisher):
    """Refit o_proj and down_proj of the small model, block by block, to what the dense model does.

    With x̂ (kept) what the small linear map receives behind finished layers, y (d_out) what it should give, and
    r = y - Ŵ x̂ - b̂ what it misses now:

        Δ = R (H + λI)⁻¹          R = E[r x̂ᵀ],   H = E[x̂ x̂ᵀ],   λ = damping · mean diag H      (1)
        Δ = argmin E‖r - Δ x̂‖² + λ ‖Δ‖²                                                        (2)
        Ŵ ← Ŵ + Δ                                                                              (3)

    With a bias, the moments in (1) are centred and b̂ ← b̂ + E[r] - Δ E[x̂] (4), the exact joint optimum. By (2) the
    error on the calibration tokens never rises, and λ draws towards the weights it started from. What y is:

        own       the dense sub-layer on the small model's hidden states
        dense     the dense model's sub-layer
        stream    that, and what the residual stream has lost before it: a norm after the sum makes it `dense`

    Where single weights were removed, all linear maps are refitted, and those that feed another are no sub-layers: y
    is the dense map's output. What is zero stays zero, and (2) is solved for every row on its own support,

        Δ_K = Δ* H_:K (H_KK)⁻¹          Δ* of (1),   K the weights that the row has                (5)

    exactly up to `exact` inputs, by conjugate gradients on all rows at once beyond. It is the compensation of any mask.
    Of a map of low rank U V it is U that is refitted, on V x̂.

    Source: the refit every correct compensation of a mask comes to (OBS, Hassibi & Stork 1993), here for all columns
    that are left. Of low rank, with `aim: own` and `damping: 0`, it is the update of U in SVD-LLM's released code (Wang
    et al., arXiv 2403.07378), there on what the dense block makes of its pruned input. Ours: a pruner refits one site
    for the layers it expects in front of it, often a mixture of candidates; this one sees those that were chosen.
    Behind dense layers and at damping 0 the two are the same.

    Memory: float64 (kept)² and (d_out, kept) of one site, and the streams of a `Twin`. One solve per site, or by (5) a
    row; it is deterministic, so nothing is kept for a resumed run. `bias` goes with groups; see the finisher of that
    name on the budget.
    """

    structures = frozenset({"groups", "weights", "n:m", "low-rank"})

    aim: Aim = "stream"
    bias: bool = False  # free biases too; families that have none get them, at the cost of d_out parameters each
    damping: float = 0.01  # ridge towards the present weights, as a share of the mean of diag H
    exact: int = 1024  # inputs up to which (5) is solved row by row
    steps: int = 100  # conjugate gradients beyond

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.damping >= 0:
            raise ValueError(f"damping is a share, 0 or more, not {self.damping}")
        if self.exact < 0 or self.steps < 1:
            raise ValueError(f"exact ≥ 0 and steps ≥ 1 are needed, not {self.exact} and {self.steps}")

    @property
    def adds_biases(self) -> bool:
        return self.bias

    @torch.no_grad()
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        errors, added = dict[str, Any](), 0
        twin = Twin(piece, piece.tokens)
        with piece.progress.stage("least squares", len(twin)) as stage:
            for here in twin:
                linear, sums = last_of(here.linear), Sums.of(here, self.aim)
                gram, reached = sums.gram, sums.reached
                if self.bias:
                    gram = gram - sums.mean[:, None] * sums.mean
                    reached = reached - sums.missing[:, None] * sums.mean
                problem = LayerProblem(linear.weight, gram, damping=self.damping, name=here.site.name)
                change = solved(problem.hessian, reached.T).T  # (1)
                if linear is here.linear and not here.site.form.coupled:
                    alone = replace(problem, weight=change)
                    change = best(alone, linear.weight != 0, exact=self.exact, steps=self.steps).weight  # (5)
                gain = 2 * float((change * reached).sum()) - float(((change @ gram) * change).sum())
                linear.weight += change.to(linear.weight.dtype)  # (3)
                if self.bias:
                    gain += float(sums.missing.square().sum())
                    added += 0 if linear.bias is not None else linear.out_features
                    bias = sums.missing - change @ sums.mean  # (4)
                    bias += 0 if linear.bias is None else linear.bias.double()
                    linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
                errors[here.site.name] = [sums.lost / sums.power, (sums.lost - gain) / sums.power] if sums.power else []
                stage.advance(note=here.site.name)
        return {"parameters_added": added, "errors": errors}


def last_of(linear: nn.Linear | LowRank) -> nn.Linear:
    """The map whose outputs are the sub-layer's; of low rank there are two."""
    return linear.u if isinstance(linear, LowRank) else linear


@dataclass(eq=False)
class Sums:
    """Means over tokens of what a linear map, of low rank its second, receives and misses."""

    gram: Float[Tensor, "kept kept"]  # E[x̂ x̂ᵀ]
    reached: Float[Tensor, "d_out kept"]  # E[r x̂ᵀ]
    mean: Float[Tensor, " kept"]  # E[x̂]
    missing: Float[Tensor, " d_out"]  # E[r]
    lost: float = 0.0  # E‖r‖²
    power: float = 0.0  # E‖y‖²

    @classmethod
    def of(cls, here: SubLayer, aim: Aim) -> Sums:
        """Over all tokens of a twin, products in float32 or better, sums in float64."""
        linear, front = last_of(here.linear), here.linear.v if isinstance(here.linear, LowRank) else nn.Identity()
        rows, columns = linear.weight.shape
        tokens, zeros = 0, partial(torch.zeros, dtype=torch.float64, device=linear.weight.device)
        sums = cls(zeros(columns, columns), zeros(rows, columns), zeros(columns), zeros(rows))
        for i in range(len(here)):
            x, y = front(here.inputs(i)).flatten(0, -2), here.wanted(i, aim).flatten(0, -2)
            r = y - linear(x)
            tokens += len(x)
            sums.gram += x.T @ x
            sums.reached += r.T @ x
            sums.mean += x.sum(0, dtype=torch.float64)
            sums.missing += r.sum(0, dtype=torch.float64)
            sums.lost += float(r.square().sum(dtype=torch.float64))
            sums.power += float(y.square().sum(dtype=torch.float64))
        gram, reached, mean, missing = (part / tokens for part in (sums.gram, sums.reached, sums.mean, sums.missing))
        return cls(gram, reached, mean, missing, sums.lost / tokens, sums.power / tokens)
