"""What a fresh process answers about the U-Net of a written pipeline: it is loaded as users load it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def answer(tensors: dict[str, Tensor], folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load the U-Net that `model_index.json` names and run it.

    Args:
        tensors: `latents` (n, c, h, w), `time`, and `conditions` (n, length, d) where there are any.
        folder: of the pipeline.

    Returns:
        Its number of parameters, and `predicted`.
    """
    home, name = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))["unet"]
    kind = getattr(importlib.import_module(home), name)
    unet = kind.from_pretrained(folder, subfolder="unet", torch_dtype=tensors["latents"].dtype, use_safetensors=True)
    given = [tensors["conditions"]] if "conditions" in tensors else []
    with torch.no_grad():
        predicted = unet.eval()(tensors["latents"], tensors["time"], *given, return_dict=False)[0]
    return {"parameters": sum(parameter.numel() for parameter in unet.parameters())}, {"predicted": predicted}
