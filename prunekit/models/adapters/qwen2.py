"""Qwen 2 and 2.5."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Qwen2(Transformer):
    """As Llama, with biases on q, k and v."""

    family = FAMILIES["qwen2"]
