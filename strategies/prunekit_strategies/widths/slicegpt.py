"""The leading principal directions of the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import ResidualStream, Width


@dataclass(frozen=True)
class SliceGPT(Width):
    """Keep the directions in which the residual stream varies most; turn all that touches it into their basis.

        C = Σ_b E[x̂ x̂ᵀ],   x̂ = x / rms(x) in front of norm b          (1)
        C Q = Q Λ,          Λ descending                                  (2)

    The first d' columns of Q stay. What norms pass on loses Σ_{i > d'} Λ_i, and with no other d' directions less.

    Source: Ashkboos et al. 2024 (arXiv 2401.15024), with its identity: RMS norms without weights commute with Q.
    Derived is the one basis of all blocks, and the division by rms in (1), as norms divide. The paper has a Q_b for
    every sub-layer, of what the sliced ones in front give, and a matrix Q_bᵀ Q_{b+1} (d', d') in every residual
    connection, which no stock class has and which is paid for; here there is none, and the result has the dense
    model's class. It turns layer norms into RMS norms, by taking the mean off what writes into the stream; models with
    layer norms are refused here.
    """

    turns: ClassVar[bool] = True

    def directions(self, stream: ResidualStream) -> Float[Tensor, "d d"]:
        assert stream.gram is not None
        _, basis = torch.linalg.eigh(stream.gram)  # (2), ascending
        basis = basis.flip(1)
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        return basis * torch.where(largest < 0, -1.0, 1.0)  # a direction has two signs
