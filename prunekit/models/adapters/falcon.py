"""Falcon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Falcon(Transformer):
    """In one linear map every KV head has its queries, its keys and its values side by side.

    With ALiBi a head is told by its place what to attend to: attention is one group then.
    """

    family = FAMILIES["falcon"]
    layers = "transformer.h"
    final = ("transformer.ln_f", "lm_head")

    def answer(self, hidden: Tensor) -> Any:
        return hidden, None

    def heads_apart(self, block: nn.Module) -> bool:
        config: Any = block.config
        return not config.alibi
