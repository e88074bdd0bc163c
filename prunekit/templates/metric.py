"""A metric for prunekit: what a budget counts, in whole units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Metric):
    """Parameters, those of attention counted several times, because every user needs a cache for them too.

        price(site, k) = a · parameters(site, k)      a = `attention` for attention, else 1      (1)

    Source: write here the paper, and where the code differs from it.
    """

    unit: ClassVar[str] = "weighted parameters"  # in sentences

    attention: int = 3  # what a parameter of attention counts; a whole number

    def price(self, site: pk.Site, kept: int) -> int:
        """What `kept` groups of a site cost: your formula goes here. It must not fall when more is kept."""
        return site.parameters(kept) * (self.attention if site.kind == "attention" else 1)  # (1)

    def outside(self, sites: Sequence[pk.Site], parameters: int) -> int:
        """What costs something and belongs to no site."""
        return parameters
