"""Targeted structured pruning: gates and weights learned together, on data sets that are weighed as they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunekit_strategies.learners.domains import DynamicLoading
from prunekit_strategies.learners.hard_concrete import HardConcrete, Loading


@dataclass(frozen=True)
class ShearedLLaMA(HardConcrete):
    """Hard-concrete gates under one exact budget, all weights of the blocks trained with them.

    Equations (1) to (4) are those of `HardConcrete`. With several data sets and `loading: dynamic`, the share of each
    follows how far its loss is above the dense model's (`DynamicLoading`); with `constant` every window has its turn.

    Source: Sheared LLaMA (arXiv 2310.06694) and its released code: 3200 steps of 32 windows of 4096 tokens, AdamW with
    betas 0.9, 0.95 at 1e-4 for weights and 1 for log α and λ, gradients of norm 1, the target reached after 640 steps,
    dynamic loading every 50, then 50 billion tokens of training. We differ: the budget is one, in prices, as in the
    code where no shape is given, and met exactly; it is met there in expectation. The rate of log α is for lessons of
    a few hundred steps. Gates of hidden dimensions and of whole blocks are not here, and embeddings, the last norm and
    the head are not trained; references of dynamic loading come from the dense model and not from a scaling law.
    """

    loading: Literal["constant", "dynamic"] = "constant"

    @property
    def unweighed(self) -> str:
        return "loading constant"

    @property
    def weighs(self) -> bool:
        return self.loading == "dynamic"

    def weighing(self, reference: list[float], kept: float) -> Loading:
        n = len(reference)
        return DynamicLoading(reference, [1 / n] * n)
