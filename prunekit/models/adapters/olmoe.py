"""OLMoE."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Olmoe(MixtureOfExperts):
    """Weights are those of a softmax over all experts, and normalised only with `norm_topk_prob`.

    Queries and keys are normed over all heads at once, so that attention is one group, kept or dropped.
    """

    family = FAMILIES["olmoe"]

    def heads_apart(self, block: nn.Module) -> bool:
        return False
