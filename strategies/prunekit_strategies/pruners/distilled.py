"""Another pruner's candidates, each trained for a few steps to do what the dense sub-layer does: Puzzle's library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Candidate, CutSubLayer, Effort, LayerProblem, LocalPruner, Need, WrongInput
from prunekit_strategies.pruners.obs.obs import OBS

BACK_OFF = 3.0  # what the rate is divided by when steps were undone
ROUNDING = 1e-6  # of a loss: what lowers it by less has not
BETAS = (0.9, 0.95)
EPSILON = 1e-8  # of Adam, for weights whose root mean square is 1


@dataclass(frozen=True)
class Distilled(LocalPruner):
    """Block-wise local distillation: every candidate of attention and MLP is trained alone, all its linear maps.

    θ are the weights of the kept groups in q, k, v, o or in gate, up, down, x what reaches the sub-layer in the dense
    model, f the dense sub-layer:

        min over θ   Σ ‖f_θ(x) - f(x)‖² / Σ ‖W x̂‖²                                                  (1)

    from the candidates of `inner`, which says what is kept; W x̂ is f(x) without its bias. Adam with a cosine, one chunk
    of calibration tokens in every step; its rate is a share of the root mean square of each weight, so that (1) is
    solved alike in all units. The last windows are held out. Every `every` steps (1) is measured on them; steps that
    have not lowered it are undone, and it goes on at a third of the rate. A candidate that nothing has lowered stays as
    `inner` has made it. Sub-layers that keep all or nothing are not trained, biases stay as they are.

    Source: Puzzle (Bercovich et al., arXiv:2411.19146), section 3, decoupled: attention and MLP are trained apart, on
    the parent's activations, so that sites with a and f candidates cost a + f trainings and not a · f. We differ:
    candidates come of a pruner, with its weights, where the paper begins with the mean of heads and neurons of large
    activations; a billion tokens are thousands here; steps that do not help are undone.
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups"})

    inner: LocalPruner = field(default_factory=OBS)  # chooses, and gives the weights to begin with
    steps: int = 32  # of every candidate; 0: none
    rate: float = 0.02  # of Adam, at its height, as a share of the root mean square of each weight
    every: int = 8  # steps from one measurement on held-out windows to the next
    held_out: float = 0.125  # share of the windows, the last ones

    def __post_init__(self) -> None:
        if self.steps < 0 or self.every < 1 or not (self.rate > 0 and 0 < self.held_out < 1):
            raise ValueError(
                f"steps ≥ 0, every ≥ 1, rate > 0 and 0 < held_out < 1 are needed, not {self.steps}, {self.every}, "
                f"{self.rate} and {self.held_out}"
            )
        if "groups" not in self.inner.structures:
            raise ValueError(f"{type(self.inner).__name__} removes no groups, and sub-layers are cut by groups")

    @property
    def needs(self) -> frozenset[Need]:
        return self.inner.needs | {"gram", "sub-layer"}

    @property
    def matrices(self) -> int:
        return self.inner.matrices

    @property
    def keeps_scales(self) -> bool:
        return self.inner.keeps_scales

    def effort(self, chunks: Sequence[int], seqlen: int) -> Effort:
        if not self.steps:
            return Effort(0)
        learned, judged = self._split(chunks)
        back = sum(chunks[learned[step % len(learned)][0]] for step in range(self.steps))
        forward = (1 + math.ceil(self.steps / self.every)) * sum(chunks[i] for i, _ in judged)
        return Effort(self.steps, forward * seqlen, back * seqlen, steps=self.steps)

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        found = self.inner.prune(layer.restricted_to(self.inner.needs), keeps)
        return [self._trained(layer, candidate) for candidate in found]

    def keep(
        self, layer: LayerProblem, groups: Sequence[int], scales: Float[Tensor, " kept"] | None = None
    ) -> Candidate:
        return self._trained(layer, self.inner.keep(layer.restricted_to(self.inner.needs), groups, scales))

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"] | None:
        return self.inner.scores(layer.restricted_to(self.inner.needs))

    def _split(self, chunks: Sequence[int]) -> tuple[list[tuple[int, slice]], list[tuple[int, slice]]]:
        """(chunks and their windows to learn from, those to judge on), each window once.

        Raises:
            WrongInput: there are fewer than two windows.
        """
        total = sum(chunks)
        if total < 2:
            raise WrongInput(
                "pruner distilled needs two windows of calibration tokens, one of them held out; give more "
                "data.calibration_tokens"
            )
        left = total - min(total - 1, max(1, round(self.held_out * total)))
        learned, judged = list[tuple[int, slice]](), list[tuple[int, slice]]()
        for i, windows in enumerate(chunks):
            own = max(0, min(left, windows))
            left -= own
            learned += [(i, slice(0, own))] if own else []
            judged += [(i, slice(own, windows))] if own < windows else []
        return learned, judged

    def _trained(self, layer: LayerProblem, candidate: Candidate) -> Candidate:
        assert candidate.kept is not None
        if layer.sublayer is None or not self.steps or len(candidate.kept) in (0, layer.n_groups):
            return candidate
        learned, judged = self._split(layer.sublayer.chunks)
        cut = layer.sublayer.cut(candidate)
        best = first = _measured(cut, judged)
        kept, rate, adam = [weight.detach().clone() for weight in cut.weights], self.rate, _adam(cut.weights)
        for step in range(self.steps):
            i, windows = learned[step % len(learned)]
            with torch.enable_grad():
                loss = cut.losses(i)[windows].mean()  # (1)
            loss.backward(inputs=cut.weights)
            _set_rate(adam, rate * 0.5 * (1 + math.cos(math.pi * step / self.steps)))
            adam.step()
            adam.zero_grad()
            if (step + 1) % self.every and step + 1 < self.steps:
                continue
            now = _measured(cut, judged)
            if now < (1 - ROUNDING) * best:
                best, kept = now, [weight.detach().clone() for weight in cut.weights]
                continue
            rate, adam = rate / BACK_OFF, _adam(cut.weights)
            with torch.no_grad():
                for weight, before in zip(cut.weights, kept, strict=True):
                    weight.copy_(before)
        return cut.candidate() if best < first else candidate


@torch.no_grad()
def _measured(cut: CutSubLayer, judged: Sequence[tuple[int, slice]]) -> float:
    """(1) on held-out windows."""
    losses = torch.cat([cut.losses(i)[windows].double() for i, windows in judged])
    return float(losses.mean())


def _adam(weights: Sequence[Tensor]) -> torch.optim.Adam:
    """That measures every weight by its root mean square; one of zeros stays."""
    groups = []
    for weight in weights:
        size = float(weight.detach().double().square().mean().sqrt()) or 0.0
        groups.append({"params": [weight], "size": size, "eps": EPSILON / size if size > 0 else math.inf})
    return torch.optim.Adam(groups, betas=BETAS)


def _set_rate(adam: torch.optim.Adam, rate: float) -> None:
    for group in adam.param_groups:
        group["lr"] = rate * group["size"]
