"""Metrics that follow from a site's numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import prunekit as pk


@dataclass(frozen=True)
class Bytes(pk.Metric):
    """Bytes of the saved parameters."""

    unit: ClassVar[str] = "bytes"

    per_parameter: int | None = None  # None: as the checkpoint has them

    def price(self, site: pk.Site, kept: int) -> int:
        return (self.per_parameter or 2) * site.parameters(kept)

    def outside(self, sites: Sequence[pk.Site], parameters: int) -> int:
        return (self.per_parameter or 2) * parameters

    def for_checkpoint(self, bytes_per_parameter: int) -> pk.Metric:
        return self if self.per_parameter else replace(self, per_parameter=bytes_per_parameter)


@dataclass(frozen=True)
class Flops(pk.Metric):
    """Floating-point operations a token takes in linear maps: a product and a sum for every parameter.

    It is refused for whole experts, for a token goes through as many of them however many there are. Of neurons inside
    experts those count that a token's experts have.
    """

    unit: ClassVar[str] = "flops"

    def price(self, site: pk.Site, kept: int) -> int:
        if site.experts:
            return 2 * site.parameters(kept) * site.selected // site.experts
        if site.kind == "experts":
            raise pk.WrongInput(
                "a token goes through as many experts as before, so their removal frees next to nothing in flops; "
                "choose metric parameters or bytes"
            )
        return 2 * site.parameters(kept)

    def outside(self, sites: Sequence[pk.Site], parameters: int) -> int:
        return 2 * parameters


@dataclass(frozen=True)
class KVCache(pk.Metric):
    """Values in the cache of attention, per token."""

    unit: ClassVar[str] = "kv-cache"
    structures: ClassVar[frozenset[str]] = frozenset({"groups"})
    counts_width: ClassVar[bool] = False  # heads keep theirs

    def price(self, site: pk.Site, kept: int) -> int:
        return kept * site.cached_per_group

    def outside(self, sites: Sequence[pk.Site], parameters: int) -> int:
        return 0
