"""Phi 3, 3.5 and 4, dense."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Phi3(Transformer):
    """As Llama, with one linear map for queries, keys and values below each other, and one for gate and up."""

    family = FAMILIES["phi3"]
