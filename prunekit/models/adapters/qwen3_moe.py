"""Qwen3-MoE."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Qwen3Moe(MixtureOfExperts):
    """As OLMoE; some blocks may have a plain MLP."""

    family = FAMILIES["qwen3_moe"]
