"""OLMo 2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Olmo2(Transformer):
    """As Llama, with a norm behind each sub-layer instead of before it.

    Queries and keys are normed over all heads at once, so that no head is what it was without another: attention is
    one group, kept or dropped.
    """

    family = FAMILIES["olmo2"]

    def adds_up(self, block: nn.Module) -> bool:
        return False

    def heads_apart(self, block: nn.Module) -> bool:
        return False
