"""Command R and Aya."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Cohere(Transformer):
    """As Llama, with attention and MLP in parallel behind one norm, and a factor on logits.

    In Command R+ every head has norm weights of its own, which no linear map holds: its attention is one group.
    """

    family = FAMILIES["cohere"]

    def heads_apart(self, block: nn.Module) -> bool:
        return not block.get_submodule("self_attn").use_qk_norm

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        config: Any = model.config
        return super().logits(model, hidden) * config.logit_scale
