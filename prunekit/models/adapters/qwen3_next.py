"""Qwen3-Next."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Qwen3Next(MixtureOfExperts):
    """As Qwen2-MoE, with a gated delta net in the place of attention in most blocks, whose key heads are groups.

    Where there is attention, q_proj makes a gate beside every query head, and its rows go with the head.
    """

    family = FAMILIES["qwen3_next"]
