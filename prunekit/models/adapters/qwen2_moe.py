"""Qwen2-MoE."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Qwen2Moe(MixtureOfExperts):
    """As OLMoE, with a shared expert beside, whose neurons are a site; some blocks may have a plain MLP."""

    family = FAMILIES["qwen2_moe"]
