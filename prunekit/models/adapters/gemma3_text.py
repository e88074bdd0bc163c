"""Gemma 3, the language model."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.gemma2 import Gemma2
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Gemma3Text(Gemma2):
    """As Gemma 2, with a norm of one head's width on queries and keys, which all heads share."""

    family = FAMILIES["gemma3_text"]
