"""gpt-oss."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.classes import FAMILIES


@dataclass(frozen=True)
class GptOss(MixtureOfExperts):
    """Experts and router have biases, matrices are transposed; weights are a softmax over the selected experts."""

    family = FAMILIES["gpt_oss"]
