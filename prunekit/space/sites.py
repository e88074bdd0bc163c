"""Sites: places where something can be removed, and what that costs in parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Allocation = tuple[int, ...]
"""Kept groups per site, in order of execution."""

Kind = Literal["attention", "mlp", "linear"]
Units = Literal["groups", "weights", "n:m"]


@dataclass(frozen=True)
class Site:
    """One place where width can be cut: the input columns of one linear map, in groups.

    A group lives or dies together with everything that feeds it (rows of the projections in
    front). Keeping 0 groups drops the whole sub-layer, its norm and biases included.

    Of kind "linear", single weights are removed: a count is that of the weights kept per output row, in exact mean
    over the rows. Keeping 0 leaves a map of zeros and its bias.
    """

    name: str  # module path of the linear map inside the model
    block: int  # index of the decoder block
    kind: Kind
    n_groups: int
    group_size: int  # input columns per group
    params_per_group: int  # parameters that go with a group, coupled rows and biases included
    params_fixed: int = 0  # parameters that go only when the whole sub-layer goes
    cached_per_group: int = 0  # values a group keeps in the KV cache per token
    spread: int = 1  # a group takes group_size/spread columns from each of `spread` equal parts
    least: int = 0  # the smallest count that may be kept
    step: int = 1  # counts are multiples of it
    pattern: int = 0  # m, where n of every m consecutive weights of a row are kept
    shares: str = ""  # sites that say the same receive the same input; "": nobody else does

    @property
    def d_in(self) -> int:
        return self.n_groups * self.group_size

    @property
    def structure(self) -> Units:
        """What is removed here."""
        return "groups" if self.kind != "linear" else "n:m" if self.pattern else "weights"

    @property
    def shape(self) -> str:
        """Sub-layers that say the same take the same time."""
        return (
            f"{self.kind}: {self.n_groups} groups of {self.group_size} columns and {self.params_per_group} parameters"
        )

    def said(self, kept: int) -> str:
        """A count in words: 12 of 32, or as a pattern, 2:4."""
        if self.pattern:
            return f"{kept * self.pattern // self.n_groups}:{self.pattern}"
        return f"{kept:,} of {self.n_groups:,}"

    def parameters(self, kept: int) -> int:
        """Parameters of the sub-layer when `kept` groups are kept."""
        return kept * self.params_per_group + (self.params_fixed if kept else 0)

    def columns(self, groups: Sequence[int]) -> list[int]:
        """Input columns of `groups`, group by group."""
        width, part = self.group_size // self.spread, self.d_in // self.spread
        return [s * part + g * width + c for g in groups for s in range(self.spread) for c in range(width)]
