"""Qwen 3, dense."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Qwen3(Transformer):
    """As Llama, with a norm of one head's width on queries and keys, which all heads share."""

    family = FAMILIES["qwen3"]
