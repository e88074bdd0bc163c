"""What a site receives, added up over tokens: its second moment, and any other statistics.

Moments are additive over batches, devices and machines: add shards, then read means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.errors import PluginError
from prunekit.layer.statistics import MapShape, Received, Statistic, Sums, Total
from prunekit.system.products import of_halves

VALUES_AT_ONCE = 2**21  # that are made wide at once, to be added: 16 MiB in float64
STRIPS = 8  # of rows, of a symmetric product: each ends at its diagonal, 9/16 of the work of a whole one


@dataclass(frozen=True)
class Gram(Statistic):
    """H = E[x̂ x̂ᵀ], of which the lower half is added up, in strips of rows as far as their diagonal."""

    name: ClassVar[str] = "gram"

    def sizes(self, shape: MapShape) -> Mapping[str, tuple[int, ...]]:
        return {"outer": (shape.d_in, shape.d_in)}

    def add(self, sums: Sums, received: Received) -> None:
        seen = received.inputs
        wide = seen if seen.is_cuda else precise(seen)
        with of_halves(seen):
            for strip in strips(seen.shape[1]):
                add_product(sums["outer"][strip, : strip.stop], wide[:, strip], wide[:, : strip.stop])

    def finish(self, sums: Sums, total: Total) -> Tensor:
        return mirrored(sums["outer"]) / total.tokens

    def flops(self, shape: MapShape, tokens: int) -> int:
        return 2 * tokens * sum((strip.stop - strip.start) * strip.stop for strip in strips(shape.d_in))


GRAM = Gram()


def collected(statistics: Sequence[Statistic], *, residual: bool) -> tuple[Statistic, ...]:
    """The gram, which every site has, and those of the statistics that there are.

    `residual`: the output of the map is a term of the residual stream.
    """
    return (GRAM, *(each for each in statistics if residual or "residual" not in each.sees))


@dataclass(eq=False)
class Moments:
    """Running sums over tokens of the statistics of one site, in float64; nobody but they know what is in them."""

    tokens: int
    statistics: tuple[Statistic, ...]
    sums: dict[tuple[str, str], Sums]  # by statistic, and by producer layer: "" for the site itself

    @classmethod
    def empty(
        cls,
        statistics: tuple[Statistic, ...],
        shape: MapShape,
        device: torch.device,
        producers: Mapping[str, MapShape] | None = None,
    ) -> Moments:
        """Nothing received yet."""
        places = _places(statistics, shape, producers or {})
        return cls(0, statistics, {key: each.start(size, device) for key, (each, size) in places.items()})

    @staticmethod
    def bytes(statistics: Sequence[Statistic], shape: MapShape, producers: Mapping[str, MapShape]) -> int:
        """That the sums take."""
        return sum(each.bytes(size) for each, size in _places(statistics, shape, producers).values())

    @staticmethod
    def flops(statistics: Sequence[Statistic], shape: MapShape, producers: Mapping[str, MapShape], tokens: int) -> int:
        """Of adding up so many tokens."""
        return sum(each.flops(size, tokens) for each, size in _places(statistics, shape, producers).values())

    def add(self, received: Received) -> None:
        """Receive a batch."""
        self.tokens += len(received.inputs)
        for each in self.statistics:
            if "producers" not in each.sees:
                each.add(self.sums[each.name, ""], received)

    def add_producer(self, path: str, received: Received) -> None:
        """What a producer layer receives for the tokens of an `add`."""
        for each in self.statistics:
            if "producers" in each.sees:
                each.add(self.sums[each.name, path], received)

    def of_map(self, shape: MapShape, batches: Iterable[Received]) -> Moments:
        """Of another map with the same input, for the same tokens: what is of the map is added up anew."""
        own = [each for each in self.statistics if "output" in each.sees]
        sums = {(each.name, ""): each.start(shape, self.outer.device) for each in own}
        for received in batches if own else ():
            for each in own:
                each.add(sums[each.name, ""], received)
        return replace(self, sums={**self.sums, **sums})

    def merged(self, other: Moments) -> Moments:
        """Both together."""
        by_name = {each.name: each for each in self.statistics}
        sums = {key: by_name[key[0]].merge(sums, other.sums[key]) for key, sums in self.sums.items()}
        return replace(self, tokens=self.tokens + other.tokens, sums=sums)

    def to(self, device: torch.device) -> Moments:
        """The same sums on a device."""
        moved = {key: {name: value.to(device) for name, value in sums.items()} for key, sums in self.sums.items()}
        return replace(self, sums=moved)

    @property
    def outer(self) -> Float[Tensor, "d d"]:
        """Σ x̂ x̂ᵀ, its lower half; finite only where all of it is."""
        return self.sums[GRAM.name, ""]["outer"]

    @property
    def power(self) -> Float[Tensor, " d"]:
        """E[x̂_j²]."""
        return self.outer.diagonal() / self.tokens

    @property
    def gram(self) -> Float[Tensor, "d d"]:
        """H = E[x̂ x̂ᵀ]."""
        return mirrored(self.outer) / self.tokens

    def settled(self) -> Float[Tensor, "d d"]:
        """H in the place of the sums, for the last who asks: of wide maps both are large."""
        return mirrored(self.outer).div_(self.tokens)

    def values(self, weight: Float[Tensor, "d_out d_in"], producer: str = "") -> dict[str, Tensor]:
        """The statistics of the site, but for its gram, or of a producer layer; by name.

        Raises:
            PluginError: a value is neither one number nor of every input.
        """
        total = Total(self.tokens, weight, None if producer else self.power)
        values = {}
        for each in self.statistics:
            if each == GRAM or (each.name, producer) not in self.sums:
                continue
            value = each.finish(self.sums[each.name, producer], total)
            if value.ndim and value.shape[-1] != weight.shape[1]:
                asked = f"one number or a last dimension of {weight.shape[1]} inputs was asked"
                raise PluginError(f"the statistic {each.name}: {asked}, not a value of shape {tuple(value.shape)}")
            values[each.name] = value
        return values


@dataclass(eq=False)
class ExpertMoments:
    """Moments of what the neurons of every expert send on, each over all tokens: zeros where others are selected."""

    each: list[Moments]

    def merged(self, other: ExpertMoments) -> ExpertMoments:
        """Both together."""
        return ExpertMoments([one.merged(two) for one, two in zip(self.each, other.each, strict=True)])

    def to(self, device: torch.device) -> ExpertMoments:
        """The same sums on a device."""
        return ExpertMoments([moments.to(device) for moments in self.each])


def _places(
    statistics: Sequence[Statistic], shape: MapShape, producers: Mapping[str, MapShape]
) -> dict[tuple[str, str], tuple[Statistic, MapShape]]:
    """Where every statistic is taken: of the site, or of every producer layer."""
    return {
        (each.name, path): (each, size)
        for each in statistics
        for path, size in (producers.items() if "producers" in each.sees else [("", shape)])
    }


def mirrored(outer: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """A symmetric matrix whose lower half is there, upper half and all, in place."""
    for strip in strips(len(outer)):
        outer[: strip.start, strip] = outer[strip, : strip.start].T
    return outer


def add_product(total: Float[Tensor, "m n"], left: Float[Tensor, "tokens m"], right: Float[Tensor, "tokens n"]) -> None:
    """total += leftᵀ right, which so written would make all of the product wide first."""
    product = multiplied(left, right)
    rows = max(1, VALUES_AT_ONCE // product.shape[1])
    for some, other in zip(total.split(rows), product.split(rows), strict=True):
        some.add_(other)


def strips(width: int) -> Iterator[slice]:
    """Rows of a symmetric matrix, some at a time."""
    height = -(-width // STRIPS)
    yield from (slice(start, min(start + height, width)) for start in range(0, width, height))


def multiplied(left: Float[Tensor, "tokens m"], right: Float[Tensor, "tokens n"]) -> Float[Tensor, "m n"]:
    """leftᵀ right in float32 or better.

    Half floats go as they are into matrix units that add up in float32: a product of two of them is exact there, so
    nothing is lost that float32 would keep, and it is made at many times the speed.
    """
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.T, right, out_dtype=torch.float32)
    with of_halves(left, right):
        return precise(left).T @ precise(right)


def precise(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
