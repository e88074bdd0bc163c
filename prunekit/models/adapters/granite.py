"""Granite 3 and 4, dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Granite(Transformer):
    """As Llama, with factors on embeddings, scores, the outputs of sub-layers, and logits."""

    family = FAMILIES["granite"]

    def adds_up(self, block: nn.Module) -> bool:
        return bool(block.residual_multiplier == 1)

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        config: Any = model.config
        return super().logits(model, hidden) / config.logits_scaling
