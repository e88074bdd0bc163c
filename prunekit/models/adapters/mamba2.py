"""Mamba 2: selective state spaces with heads; time steps, B and C come from the first linear map too."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.models.adapters.mixer import Mixer


@dataclass(frozen=True)
class Mamba2(Mixer):
    """Single weights of in_proj and out_proj; convolutions, A, D, biases of time steps, norms and embeddings stay."""

    linears = ("in_proj", "out_proj")
