"""OPT: biases everywhere, a plain MLP inside the block, norms before or (350M) after the sum."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class OPT(Transformer):
    """Every head has its own keys and values; embeddings may be narrower than the model."""

    family = FAMILIES["opt"]
    layers = "model.decoder.layers"
    final = ("model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head")
