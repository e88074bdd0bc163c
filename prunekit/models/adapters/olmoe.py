"""OLMoE."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Olmoe(MixtureOfExperts):
    """Weights are those of a softmax over all experts, and normalised only with `norm_topk_prob`."""

    family = FAMILIES["olmoe"]
