"""FISTAPruner: a lasso on the output error finds the weights, a bisection the penalty; it may start from any mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, Need, best_weights
from prunekit.layer.candidates import Per
from prunekit_strategies.pruners.compensation import SINGLE, Aim, aimed, best, check, conjugate, needed, reached

Mask = Bool[Tensor, "d_out d_in"]


@dataclass(frozen=True)
class FISTA(LocalPruner):
    """Shrink the weights by an l1 penalty, round to the count, and look for the penalty that rounds best.

    In scaled inputs, S = diag(H)^½ or I, A = S⁻¹ H S⁻¹ (d_in, d_in) with largest eigenvalue L, B₀ = W* S (d_out, d_in)
    and E(B) = tr (B - B₀) A (B - B₀)ᵀ, from the best B that was found so far:

        lasso      min ½ E(B) + μ Σ |b_ij|                                              (1)
        gradient   B ← shrink(V - (V - B₀) A / L, μ / L),    shrink(x, t) = sign x · max(|x| - t, 0)
        momentum   t' = (1 + √(1 + 4t²)) / 2,    V ← B + (t - 1)/t' (B - B_before)      (2)
        round      B to its k d_out largest |b_ij|                                      (3)
        penalty    bisect μ: up where √tr (B - B_round) A (B - B_round)ᵀ > share · √E(B_round), down otherwise (4)

    `trials` penalties are tried. Every rounded weight gets `polish` steps towards the best weights on its support
    before it is judged; the best is kept, the start included, and solved on its support. So no answer is worse than
    its start on the damped moments.

    Source: FISTAPruner (Zhao et al. 2024, arXiv 2408.03728), which corrects the errors of earlier maps: that is `aim:
    dense`, not the default here. It has 20 rounds and starts from Wanda or SparseGPT: give one as `start`. Ours:
    `scaled`, `polish` and the last solution, the aims of `obs`, and that (4) bisects log μ between 10⁻⁶ and 1 times the
    penalty at which nothing is left. (1)-(4) run in float32. Weights that nothing reaches go first; on a tie of (3) the
    lower column stays.
    """

    structures: ClassVar[frozenset[str]] = SINGLE

    start: LocalPruner | None = None  # whose answer is refined; None: the largest |b_ij|
    aim: Aim = "own"  # its own output on what it will see, the dense model's output, or its residual stream
    per: Per = "row"
    scaled: bool = True  # S = diag(H)^½: the unit of an input is immaterial
    rounds: int = 60  # of (2) per penalty
    trials: int = 12  # penalties; 0: the start's mask with its best weights
    share: float = 0.3  # of the error that rounding may have
    polish: int = 10  # conjugate gradients on a rounded weight before it is judged
    exact: int = 1024  # inputs up to which rows are solved exactly
    steps: int = 100  # conjugate gradients beyond

    def __post_init__(self) -> None:
        check(self, self.start)
        if self.rounds < 1 or self.steps < 1 or min(self.trials, self.polish, self.exact) < 0:
            raise ValueError(
                "rounds, steps ≥ 1 and trials, polish, exact ≥ 0 are needed, not "
                f"{self.rounds}, {self.steps}, {self.trials}, {self.polish} and {self.exact}"
            )
        if not 0 < self.share < 1:
            raise ValueError(f"share lies between 0 and 1, not {self.share}")

    @property
    def needs(self) -> frozenset[Need]:
        return needed(self.aim, self.start)

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        starts = [None] * len(keeps)
        if self.start is not None:
            starts = [c.weight for c in self.start.prune(layer.restricted_to(self.start.needs), keeps)]
        layer = aimed(layer, self.aim)
        scale = layer.hessian.diagonal().sqrt() if self.scaled else layer.hessian.new_ones(layer.d_in)  # s
        gram, target = (layer.hessian / scale / scale[:, None]).float(), (layer.target * scale).float()
        largest = float(torch.linalg.eigvalsh(gram.double())[-1])  # L
        alive = reached(layer) > 0
        candidates = []
        for keep, start in zip(keeps, starts, strict=True):

            def choose(x: Tensor, keep: int = keep) -> Mask:
                score = torch.where(alive, x.abs(), -1)  # below those that the lasso made zero
                return best_weights(score, [keep], self.per, layer.m)[0]  # (3)

            mask = choose(target) if start is None else start != 0
            if self.trials and 0 < keep < layer.d_in:
                first = torch.where(mask, target if start is None else (start.double() * scale).float(), 0)
                mask = self._refined(gram, target, largest, first, mask, choose)
            candidates.append(best(layer, mask, exact=self.exact, steps=self.steps))
        return candidates

    def _refined(
        self, gram: Tensor, target: Tensor, largest: float, found: Tensor, mask: Mask, choose: Callable[[Tensor], Mask]
    ) -> Mask:
        """The support of the best rounded weight of all trials, and of what was `found` before them."""

        def error(w: Tensor, other: Tensor = target) -> float:
            lost = w - other
            return max(float(((lost @ gram) * lost).sum()), 0.0) ** 0.5

        least = error(found)
        high = math.log(max(float((target @ gram).abs().max()), 1e-30))  # from there on the lasso is zero
        low = high + math.log(1e-6)
        for _ in range(self.trials):
            middle = (low + high) / 2
            fitted = lasso(gram, target, found, math.exp(middle), largest, self.rounds)
            support = choose(fitted)
            rounded = torch.where(support, fitted, 0)
            if error(fitted, rounded) > self.share * error(rounded):
                low = middle  # (4)
            else:
                high = middle
            rounded = conjugate(gram, target, support, steps=self.polish, start=rounded)
            if (loss := error(rounded)) < least:
                least, found, mask = loss, rounded, support
        return mask


def lasso(gram: Tensor, target: Tensor, start: Tensor, penalty: float, largest: float, rounds: int) -> Tensor:
    """So many rounds of (2) on (1), all in scaled weights; (d_out, d_in)."""
    w, v, t = start, start, 1.0
    for _ in range(rounds):
        before, w = w, torch.nn.functional.softshrink(v - (v - target) @ gram / largest, penalty / largest)
        t, last = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        v = w + (last - 1) / t * (w - before)  # (2)
    return w
