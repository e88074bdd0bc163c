"""StarCoder 2."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Starcoder2(Transformer):
    """As Llama, with biases everywhere, layer norms and a plain MLP."""

    family = FAMILIES["starcoder2"]
