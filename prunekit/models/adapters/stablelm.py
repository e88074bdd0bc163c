"""StableLM."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class StableLM(Transformer):
    """As Llama, with layer norms; in parallel, attention and MLP share one.

    In StableLM 2 12B every head has a norm of its own, which is no linear map: its attention is one group.
    """

    family = FAMILIES["stablelm"]

    def heads_apart(self, block: nn.Module) -> bool:
        return not block.get_submodule("self_attn").qk_layernorm
