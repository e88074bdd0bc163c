"""The dense model of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit.plugins.adapter import ModelAdapter
from prunekit.system.memory import SHARES, Shares


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense model, ready to be pruned."""

    model: PreTrainedModel  # in the dtype and on the device of the computation, not trainable
    tokenizer: Any
    adapter: ModelAdapter
    dtype: torch.dtype  # of the checkpoint: what is saved again
    name: str
    fingerprint: str  # sha256 over its names, shapes and values
    shares: Shares = SHARES  # of the memory, for whoever works on it
    converted: Mapping[str, int] = field(default_factory=dict)  # other dtype in its files -> number of parameters
