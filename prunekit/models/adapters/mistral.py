"""Mistral, with or without a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Mistral(Transformer):
    """As Llama; head width need not be hidden size / heads."""

    family = FAMILIES["mistral"]
