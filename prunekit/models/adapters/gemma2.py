"""Gemma 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Gemma2(Transformer):
    """As Llama, with norms before and behind each sub-layer; scores and logits are bounded by tanh."""

    family = FAMILIES["gemma2"]

    def adds_up(self, block: nn.Module) -> bool:
        return False

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        config: Any = model.config
        logits, bound = super().logits(model, hidden), config.final_logit_softcapping
        return logits if bound is None else (logits / bound).tanh() * bound
