"""LLaVA: a language model that receives projected features of images among its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES, Family
from prunekit.plugins.adapter import UnsupportedModel

INSIDE = ("llama", "mistral", "qwen2", "qwen3")  # families whose blocks have Llama's parts under Llama's names


@dataclass(frozen=True)
class Llava(Transformer):
    """The blocks of the language model, which are as Llama's; vision tower and projector stay.

    The stock class makes whatever language model the config names, so one of unequal layers is a class of ours inside
    the stock LLaVA.
    """

    family = FAMILIES["llama"]
    layers = "model.language_model.layers"
    final = ("model.language_model.norm", "lm_head")
    images = True

    def opened(self, model: PreTrainedModel) -> PreTrainedModel:
        self.family_of(model.config)
        return model

    def family_of(self, config: Any) -> Family:
        inside = str(config.text_config.model_type).removeprefix("prunekit_")
        if inside not in INSIDE:
            raise UnsupportedModel(
                f"this LLaVA has a language model of type {inside!r}; those of {', '.join(INSIDE)} can be pruned"
            )
        return FAMILIES[inside]
