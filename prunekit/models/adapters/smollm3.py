"""SmolLM 3."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class SmolLM3(Transformer):
    """As Llama; some layers attend without positions."""

    family = FAMILIES["smollm3"]
