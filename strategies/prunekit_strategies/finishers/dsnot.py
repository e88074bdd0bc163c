"""DSnoT: single weights change places, one for one, until the mean output of every row is as it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Finisher, Workpiece
from prunekit.calibration.twin import Twin
from prunekit.models.adapters.transformer import Transformer


@dataclass(frozen=True)
class DSnoT(Finisher):
    """Swap kept and removed weights of a row, without training, where that takes from its mean error.

    W (d_out, d_in) of the dense model, Ŵ of the small one; μ_j, v_j mean and variance of input j as the pruned layers
    in front of it give it. In every row, up to `swaps` times:

        error    e = Σ_j (W_j - Ŵ_j) μ_j                                                                (1)
        grow     of the removed with sign(e) W_j μ_j > 0 the largest sign(e) W_j μ_j / v_j              (2)
        prune    of the kept with sign(e) Ŵ_j μ_j < 0 the smallest |Ŵ_j| (μ_j² + v_j)^½                 (3)
        swap     e ← e - W_grow μ_grow + Ŵ_prune μ_prune,   only if |e| falls                           (4)

    until e changes its sign or |e| ≤ threshold · (Σ_j W_j² (μ_j² + v_j))^½, the output's size were inputs independent.
    For n:m what is pruned stands in the block of what grows. Every row, and every block, keeps its count.

    A weight that grows has the dense model's value, and kept ones stay as they are. Behind `magnitude`, `wanda` and
    the like, that makes all of them the dense ones, which is the method of the paper. Behind a pruner that has moved
    weights, the small model's make up for what was removed with them: (1) and (3) are of their values of now, so
    that |e| falls all the same, but grown weights are strangers among them. Little is to be won there; take
    `least-squares`, or let it follow.

    Source: Zhang et al. 2024, Dynamic Sparse No Training (arXiv 2310.08915), where only attention is swapped. In the
    released code the threshold is 0.1 of a sum over the tokens of a window, swaps go on behind a change of sign unless
    told (`without_same_sign`), what was grown or pruned once is not looked at again, and for n:m the weakest of the
    block goes whatever its sign: with few inputs |e| ends larger than it began. Ours: the unit of the threshold, |e|
    in (4), variances pooled exactly over all tokens (Chan et al. 1979), where averages within batches miss what differs
    between them, and `guard`: rows whose output error has risen on the calibration tokens become what they were.
    Lower columns go first on a tie. Costs one pass through both models and a few times d_out d_in per swap.
    """

    structures = frozenset({"weights", "n:m"})

    swaps: int = 50  # most per row
    threshold: float = 0.1  # |e| that is small enough, as a share of the row's output
    skip_mlp: bool = True
    guard: bool = True  # False: as the paper, whatever the whole error of the row

    def __post_init__(self) -> None:
        if self.swaps < 1 or not self.threshold >= 0:
            raise ValueError(f"swaps ≥ 1 and threshold ≥ 0 are needed, not {self.swaps} and {self.threshold}")

    @torch.no_grad()
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        errors, swaps, means = dict[str, Any](), 0, torch.zeros(2, dtype=torch.float64)
        twin, adapter = Twin(piece, piece.tokens), piece.adapter
        attention = ""  # where a mixer is all there is, nothing is skipped
        if self.skip_mlp and isinstance(adapter, Transformer):
            attention = f"{adapter.family.attention}."
        with piece.progress.stage("swap", len(twin)) as stage:
            for here in twin:
                stage.advance(note=here.site.name)
                if not adapter.path(here.site).startswith(attention):
                    continue
                inputs = [here.inputs(i).flatten(0, -2) for i in range(len(here))]
                seen = Spread.of(inputs)
                old, dense = here.linear.weight.double(), here.dense_linear.weight.double()
                new, made = swapped(old, dense, seen, self.swaps, self.threshold, here.site.form.m)
                before, after = (lost(inputs, dense - w) for w in (old, new))
                if self.guard:
                    worse = after > before
                    new, after, made = (
                        torch.where(worse[:, None], old, new), torch.where(worse, before, after), made * ~worse,
                    )  # fmt: skip
                power = float(lost(inputs, dense).sum())
                errors[here.site.name] = [float(e.sum()) / power for e in (before, after)] if power else []
                swaps += int(made.sum())
                means += torch.stack([((dense - w) @ seen.mean).square().sum().cpu() for w in (old, new)])
                here.linear.weight.copy_(new)
        left = float(means[1] / means[0]) if means[0] > 0 else 1.0
        return {"swaps": swaps, "squared_mean_error_left": left, "errors": errors}


@dataclass(eq=False)
class Spread:
    """Mean and variance of inputs, in float64, batch by batch, exact however they are cut into batches."""

    mean: Float[Tensor, " d"]
    squares: Float[Tensor, " d"] = field(init=False)  # Σ (x - mean)²
    tokens: int = 0

    def __post_init__(self) -> None:
        self.squares = torch.zeros_like(self.mean)

    @classmethod
    def of(cls, batches: list[Tensor]) -> Spread:
        seen = cls(torch.zeros(batches[0].shape[1], dtype=torch.float64, device=batches[0].device))
        for batch in batches:
            seen.add(batch.double())
        return seen

    def add(self, x: Float[Tensor, "tokens d"]) -> None:
        mean, before, self.tokens = x.mean(0), self.tokens, self.tokens + len(x)
        apart = mean - self.mean
        self.squares += (x - mean).square().sum(0) + apart.square() * (before * len(x) / self.tokens)
        self.mean = self.mean + apart * (len(x) / self.tokens)

    @property
    def variance(self) -> Float[Tensor, " d"]:
        return self.squares / self.tokens


def swapped(
    weight: Float[Tensor, "d_out d_in"],
    dense: Float[Tensor, "d_out d_in"],
    seen: Spread,
    swaps: int,
    threshold: float,
    block: int = 0,
) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
    """(1) to (4) on every row, all of them side by side; the new weight and how many swaps each row had."""
    power = seen.mean.square() + seen.variance
    variance = seen.variance.clamp_min(1e-12 * float(power.max()) + 1e-300)  # a constant input grows first
    weight, made = weight.clone(), torch.zeros(len(weight), dtype=torch.long, device=weight.device)
    error = (dense - weight) @ seen.mean  # (1)
    enough = threshold * (dense.square() @ power).sqrt()
    width = block or weight.shape[1]
    rows = (error.abs() > enough).nonzero()[:, 0]
    for _ in range(swaps):
        if not len(rows):
            break
        w, e = weight[rows], error[rows]
        come, go = e.sign()[:, None] * dense[rows] * seen.mean, e.sign()[:, None] * w * seen.mean
        removable = (w != 0) & (go < 0)
        paired = removable.unflatten(1, (-1, width)).any(2).repeat_interleave(width, 1)  # with one of the own block
        gain = torch.where((w == 0) & (come > 0) & paired, come / variance, -1)
        grown = gain.argmax(1)  # (2)
        near = torch.arange(w.shape[1], device=w.device) // width == grown[:, None] // width
        cost = torch.where(removable & near, w.abs() * power.sqrt(), torch.inf)
        pruned = cost.argmin(1)  # (3)
        place = torch.arange(len(rows), device=w.device)
        after = e.abs() - come[place, grown] + go[place, pruned]  # (4), along the sign of e
        does = (gain[place, grown] > 0) & (after.abs() < e.abs())
        rows, grown, pruned, after, e = rows[does], grown[does], pruned[does], after[does], e[does]
        weight[rows, grown] = dense[rows, grown]
        weight[rows, pruned] = 0
        error[rows] = e.sign() * after
        made[rows] += 1
        rows = rows[after > enough[rows]]
    return weight, made


def lost(inputs: list[Tensor], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " d_out"]:
    """Σ (w x)² over tokens, by row."""
    return sum(((x @ weight.to(x).T).square().sum(0, dtype=torch.float64) for x in inputs), torch.zeros(()).to(weight))
