"""Qwen2.5-VL: a language model whose positions of images have three coordinates."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class Qwen2_5VL(Transformer):
    """The blocks of the language model, which are as Qwen2's; the vision tower and its merger stay.

    The model itself makes cosines and sines of its three rows of positions, once for all blocks, and hands them to
    each; of text alone the rows are equal. The stock attention takes the width of a head from hidden size / heads, so
    fewer heads are of our class also where all layers agree.
    """

    family = FAMILIES["qwen2_5_vl"]
    layers = "model.language_model.layers"
    final = ("model.language_model.norm", "lm_head")
    images = True
