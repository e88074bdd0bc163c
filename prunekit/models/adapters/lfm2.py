"""LFM2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class LFM2(Transformer):
    """As Llama, with a short convolution in the place of attention in most blocks, whose channels are groups."""

    family = FAMILIES["lfm2"]
    final: ClassVar[tuple[str, ...]] = ("model.embedding_norm", "lm_head")
