"""A width for prunekit: which channels of the residual stream stay."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Width):
    """Keep the channels that are large behind the norm of any sub-layer.

        u_c = max_b a_bc        a: what norm b makes of channel c, root mean square over windows          (1)

    How many stay follows from the budget. Source: write here the paper, and where the code differs from it.
    """

    def directions(self, stream: pk.ResidualStream) -> Int64[Tensor, " d"]:
        """All channels, the most important first: your formula goes here."""
        return stream.absolute.amax(0).argsort(descending=True, stable=True)  # (1); ties go to the lower channel
