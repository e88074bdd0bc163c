"""Llama 2 and 3, and models of the same shape."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Llama(Transformer):
    """Separate q, k, v and o with grouped KV heads; a gated MLP."""

    family = FAMILIES["llama"]
