"""Text of several data sets for a training, whose shares go on moving while it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunekit import TokenBatch
from prunekit.models.blocks import chunks
from prunekit.system.checkpoints import Checkpoints
from prunekit_strategies.learners.domains import DynamicLoading, RobustLoading

Loading = Literal["fixed", "dynamic", "robust"]


def weighed(tokens: TokenBatch, domains: Mapping[str, float]) -> TokenBatch:
    """As many windows, every data set with its share of them: of one with more than it has windows some come again.

    The same text where no shares are known of all its data sets: a learner that weighs them has learned on others.
    """
    names = list(dict.fromkeys(tokens.origins))
    total = sum(domains.get(name, 0.0) for name in names)
    if not names or not {*names} <= domains.keys() or total <= 0:
        return tokens
    exact = {name: len(tokens) * domains[name] / total for name in names}
    counts = {name: int(share) for name, share in exact.items()}
    rest = sorted(names, key=lambda name: counts[name] - exact[name])[: len(tokens) - sum(counts.values())]
    own = {name: [i for i, origin in enumerate(tokens.origins) if origin == name] for name in names}
    placed = [
        ((turn + 0.5) / count, own[name][turn % len(own[name])])
        for name in names
        for count in [counts[name] + (name in rest)]
        for turn in range(count)
    ]
    return tokens.rows([i for _, i in sorted(placed)])


@dataclass(eq=False)
class Shares:
    """What is learned from, in batches, and what is judged on, by data set.

    After every judging the shares move by the rule of a learner that weighs data sets, (1) of `DynamicLoading` or (1)
    of `RobustLoading`, on the held-out losses above those that the dense model has there. The losses are saved, so that
    a training that goes on moves them again as before.
    """

    learned: TokenBatch
    judged: TokenBatch
    begin: Mapping[str, float]  # shares by label: those of a learner; else those of the text
    rule: Loading
    epochs: int
    batch_tokens: int
    checkpoints: Checkpoints
    name: str  # of the training's own state

    def __post_init__(self) -> None:
        self.labels = list(dict.fromkeys(self.learned.origins))
        given = [self.begin.get(label, 0.0) for label in self.labels]
        known = {*self.labels} <= self.begin.keys() and sum(given) > 0 and not (self.moves and min(given) <= 0)
        counts = {label: self.learned.origins.count(label) for label in self.labels}
        first = {label: self.begin[label] if known else counts[label] for label in self.labels}
        total = sum(first.values())
        self.now = {label: first[label] / total for label in self.labels} if known or self.moves else {}
        self.batches = self._dealt()
        self.losses: list[list[float]] = []

    @property
    def moves(self) -> bool:
        """Whether there are several data sets to weigh, a rule to do it by, and a window to judge one of them on."""
        return self.rule != "fixed" and len(self.labels) > 1 and not self.judged.parts.keys().isdisjoint(self.labels)

    def resume(self, reference: Callable[[Sequence[Tensor]], float]) -> None:
        """Hear the dense model, and move the shares as in the judgings that there were before an interruption."""
        if not self.moves:
            return
        begun = self.checkpoints.load(self.name) or {}
        judgings = len(begun["history"]) if begun else 0  # one more may have been saved, of an epoch that was not
        saved = self.checkpoints.load(f"{self.name}-shares") or {}
        known = saved["reference"].tolist() if saved else self._by_label(reference)
        shares = [self.now[label] for label in self.labels]
        # nothing more is pruned, so that there is no course of losses that foretells an end
        self._loading = (
            DynamicLoading(known, shares) if self.rule == "dynamic" else RobustLoading(known, shares, 1.0, fit=False)
        )
        for i, losses in enumerate(saved["losses"].tolist()[:judgings] if saved else []):
            self._move(losses, i)

    def judge(self, mean: Callable[[Sequence[Tensor]], float]) -> float:
        """The loss on what is held out, in the mean; the shares move by it."""
        if not self.moves:
            return mean(list(chunks(self.judged, self.batch_tokens)))
        losses = self._by_label(mean)
        parts = self.judged.parts  # of a single data set, too, whose windows have no labels of their own
        windows = [len(parts[label]) if label in parts else 0 for label in self.labels]
        self._move(losses, len(self.losses))
        told = {"losses": self.losses, "reference": self._loading.reference}
        tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in told.items()}
        self.checkpoints.save(f"{self.name}-shares", tensors)
        return sum(n * loss for n, loss in zip(windows, losses, strict=True)) / sum(windows)

    def _by_label(self, mean: Callable[[Sequence[Tensor]], float]) -> list[float]:
        """Of every data set; of one that is not held out, the mean of the others."""
        parts = self.judged.parts
        found = {label: mean(list(chunks(parts[label], self.batch_tokens))) for label in self.labels if label in parts}
        there = sum(found.values()) / len(found)
        return [found.get(label, there) for label in self.labels]

    def _move(self, losses: list[float], judging: int) -> None:
        self.losses.append(losses)
        self._loading.heard(losses, judging / self.epochs, 1.0)
        self.now = dict(zip(self.labels, self._loading.weights, strict=True))
        self.batches = self._dealt()

    def _dealt(self) -> list[Tensor]:
        return list(chunks(weighed(self.learned, self.now), self.batch_tokens))
