"""Sites: places where something can be removed, and what that costs in parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from prunekit.space.forms import GROUPS, Form

Allocation = tuple[int, ...]
"""Kept groups per site, in order of execution."""

Kind = Literal["attention", "mixer", "mlp", "experts", "linear"]


@dataclass(frozen=True)
class Site:
    """One place where something can be removed: the input columns of one linear map, in groups.

    Of form groups, a group lives or dies together with everything that feeds it (rows of the producer layers). Keeping
    0 groups drops the whole sub-layer, its norm and biases included.

    Experts are the inputs of a map of ones, the sum over them, which meets every channel of a token by itself: one
    column each. At least `minimum` of them stay.

    Where neurons inside experts go, their number is that of every expert of the layer, and each keeps those of its own
    choice: the map is that of all experts side by side, and a group is `tile` neurons of every one.

    Of the other forms the kind is linear. Where single weights are removed, a count is that of the weights kept per
    output row, in exact mean over the rows; keeping 0 leaves a map of zeros and its bias. Of low rank, it is the rank
    of what takes the place of the map, and the largest count the map itself.

    Where values get narrower, the map is the one behind attention, the kind attention, and a count that of the values
    of each of its heads.
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
    d_out: int = 1  # rows of the linear map
    form: Form = GROUPS
    input_group: str = ""  # sites of one input group receive the same input; "": nobody else does
    inputs: int = 0  # columns of the linear map where counts are not of them; 0: all columns are in groups
    spared: bool = False  # nothing of it may go; its price counts
    minimum: int = 0  # groups that have to stay: as many experts as a token selects
    multiple: int = 1  # counts between none and all are multiples of it, as hardware and formats like them
    channels: int = 1  # inputs of the map that one token brings: one, or one per channel where it is the sum of experts
    experts: int = 0  # whose neurons go, as many of each, each its own; 0: there are no neurons of experts
    selected: int = 0  # of these experts by a token

    @property
    def d_in(self) -> int:
        """Columns of the linear map."""
        return self.inputs or self.n_groups * self.group_size

    @property
    def width(self) -> int:
        """Values of a token that reach the linear map."""
        return self.channels * self.d_in

    @property
    def kept_width(self) -> int:
        """Values of a token that are kept until the site is done: of experts, those that a token selects."""
        if self.experts:
            return self.d_in // self.experts * self.selected
        return self.channels * (self.minimum if self.channels > 1 else self.d_in)

    @property
    def least(self) -> int:
        """The smallest count that may be kept."""
        return self.n_groups if self.spared else max(self.minimum, self.form.least(self.d_in))

    @property
    def tile(self) -> int:
        """Neurons of every expert that a group stands for; 1 where there are none."""
        return self.group_size // self.experts if self.experts else 1

    @property
    def one(self) -> Site:
        """Neurons of a single expert as a site, of which a count is `tile` times as many; any other site as it is."""
        if not self.experts:
            return self
        price = self.params_per_group // self.group_size
        return replace(
            self, n_groups=self.n_groups * self.tile, group_size=1, params_per_group=price, minimum=0, spread=1,
            experts=0, selected=0,
        )  # fmt: skip

    @property
    def step(self) -> int:
        """What counts are multiples of."""
        return self.form.step(self.d_in)

    @property
    def shape(self) -> str:
        """Sub-layers of one shape take the same time."""
        return (
            f"{self.kind}: {self.n_groups} groups of {self.group_size} columns and {self.params_per_group} parameters"
        )

    def describe(self, kept: int) -> str:
        """A count in words: 12 of 32, or as a pattern, 2:4, or as a rank, rank 96 of 288."""
        return self.form.describe(kept * self.tile, self.n_groups * self.tile, self.d_in, self.d_out)

    def parameters(self, kept: int) -> int:
        """Parameters of the sub-layer when `kept` groups are kept; of low rank, never more than the map's own."""
        parameters = kept * self.params_per_group + (self.params_fixed if kept else 0)
        most = self.form.whole(self.d_in, self.d_out)
        return parameters if most is None else min(parameters, most)

    def columns(self, groups: Sequence[int]) -> list[int]:
        """Input columns of `groups`, group by group."""
        width, part = self.group_size // self.spread, self.d_in // self.spread
        return [s * part + g * width + c for g in groups for s in range(self.spread) for c in range(width)]
