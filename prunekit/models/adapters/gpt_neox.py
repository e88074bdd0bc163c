"""GPT-NeoX and Pythia: attention and MLP in parallel or in sequence, biases, a plain MLP."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class GPTNeoX(Transformer):
    """Queries, keys and values are rows of one linear map, side by side in every head."""

    family = FAMILIES["gpt_neox"]
    layers = "gpt_neox.layers"
    final = ("gpt_neox.final_layer_norm", "lm_head")
