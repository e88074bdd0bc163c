"""The channels of the residual stream with large activations."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from prunekit import ResidualStream, Width


@dataclass(frozen=True)
class Minitron(Width):
    """Keep the channels that are large behind the norms of the dense model; weights stay as they are.

        u_c = Σ_b √ E_windows[ (mean over tokens of |LN_b(x)_c|)² ]       over norms b before sub-layers

    Source: Muralidharan et al. 2024 (arXiv 2407.14679), mean over the sequence, l2 over the batch, summed over norms;
    which norms, after the code of NVIDIA's Model-Optimizer: that of the head is not asked. Ties go to the lower
    channel. √(d/d') in the norms' weights makes up for the shorter mean (derived).
    """

    def directions(self, stream: ResidualStream) -> Int64[Tensor, " d"]:
        return stream.absolute[:-1].sum(0).argsort(descending=True, stable=True)
