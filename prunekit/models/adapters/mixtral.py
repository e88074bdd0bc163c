"""Mixtral."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Mixtral(MixtureOfExperts):
    """Weights of the selected experts are normalised to one."""

    family = FAMILIES["mixtral"]
