"""The contract of statistics: what is added up over the tokens that reach a linear map.

A statistic is one object in one file, the core's or a third party's: what it has to see, how it adds up, what comes of
it, what it takes. Whoever moves sums between devices and machines needs no names of statistics.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.errors import PluginError

T = TypeVar("T")

Sums = dict[str, Tensor]
"""Running sums of one statistic, by its own names."""

Part = Literal["output", "residual", "entered", "dense", "producers"]
"""What a statistic may look at beside the inputs x̂ of a map: see `Statistic.sees`."""


@dataclass(frozen=True)
class MapShape:
    """A linear map in numbers."""

    d_in: int
    d_out: int
    shared: bool = False  # other maps receive the same input


class Statistic(ABC):
    """Something that is added up over tokens. Subclass it as a frozen dataclass; its fields are its options.

    It is the mean over tokens of what `add` adds, for every input, unless it says otherwise: sums are float64 tensors
    that start at zero and add up. The value is one number for the layer, of shape (), or its last dimension is d_in.
    """

    name: ClassVar[str]  # by which plug-ins `require` it
    sees: ClassVar[frozenset[Part]] = frozenset()
    """What it looks at beside inputs and windows: `output` of the map; `residual`, the stream that a sub-layer is added
    to, only there where it is the output of one; `entered`, that stream before the block, beside `residual`; `dense`,
    the same in the dense model, which is streamed beside; or `producers`: it is taken of what every producer layer
    receives, not of what the map does."""

    def sizes(self, shape: MapShape) -> Mapping[str, tuple[int, ...]]:
        """The shapes of its sums, by name."""
        return {"sum": (shape.d_in,)}

    @abstractmethod
    def add(self, sums: Sums, received: Received) -> None:
        """Add some tokens to the sums, in place."""

    def finish(self, sums: Sums, total: Total) -> Tensor:
        """The value, when all tokens are there; the sums are not changed."""
        return sums["sum"] / total.tokens

    def start(self, shape: MapShape, device: torch.device) -> Sums:
        """Sums of no token."""
        return {name: torch.zeros(size, dtype=torch.float64, device=device) for name, size in self.sizes(shape).items()}

    def merge(self, one: Sums, other: Sums) -> Sums:
        """The sums of both, neither changed."""
        return {name: value + other[name] for name, value in one.items()}

    def bytes(self, shape: MapShape) -> int:
        """That its sums take."""
        return torch.float64.itemsize * self._values(shape)

    def flops(self, shape: MapShape, tokens: int) -> int:
        """Of adding up: a product and a sum for every value and token, and the output of the map where it is seen."""
        made = shape.d_in * shape.d_out if "output" in self.sees else 0
        return 2 * tokens * (self._values(shape) + made)

    def _values(self, shape: MapShape) -> int:
        return sum(math.prod(size) for size in self.sizes(shape).values())


Need = str | Statistic
"""What a plug-in may ask calibration for: a name in `prunekit.calibration.statistics.STATISTICS`, or a statistic."""


def named(needs: frozenset[Need]) -> frozenset[str]:
    """The names of what a plug-in needs."""
    return frozenset(need if isinstance(need, str) else need.name for need in needs)


class Received:
    """What some tokens bring to a linear map, and what it makes of them. Nothing is computed unless it is asked for."""

    def __init__(
        self,
        caught: Callable[[], Tensor],
        linear: nn.Linear | None = None,
        length: int = 1,
        residual: Callable[[], Tensor] | None = None,
        dense: Received | None = None,
        channels: int = 1,
        entered: Callable[[], Tensor] | None = None,
    ) -> None:
        """`caught`, `residual` and `entered` give (..., d); `length`: tokens of a window; `channels`: inputs of one."""
        self._caught, self._linear, self._length, self._residual, self._dense = caught, linear, length, residual, dense
        self.channels, self._entered = channels, entered

    @cached_property
    def _inputs(self) -> Tensor:
        return self._caught()

    @property
    def inputs(self) -> Float[Tensor, "tokens d_in"]:
        """x̂."""
        return self._inputs.flatten(0, -2)

    @property
    def windows(self) -> Float[Tensor, "windows length d_in"]:
        """x̂, window by window."""
        return self._inputs.reshape(-1, self._length * self.channels, self._inputs.shape[-1])

    def by_token(self, values: Float[Tensor, "inputs d"]) -> Float[Tensor, "tokens channels d"]:
        """Values of every input, those that one token brings together: one, or one of every channel at experts.

        Means are over inputs: what is added once for a token has to count `channels` times.
        """
        return values.unflatten(0, (-1, self.channels))

    @cached_property
    def made(self) -> Float[Tensor, "... d_out"]:
        """What the map makes of its inputs, in the shape in which the model has it."""
        return _there(self._linear, "output")(self._inputs)

    @property
    def output(self) -> Float[Tensor, "tokens d_out"]:
        """y = W x̂ + b."""
        return self.made.reshape(-1, self._d_out)

    @property
    def product(self) -> Float[Tensor, "tokens d_out"]:
        """W x̂."""
        bias = _there(self._linear, "output").bias
        return (self.made if bias is None else self.made - bias).reshape(-1, self._d_out)

    @property
    def residual(self) -> Float[Tensor, "tokens d_out"]:
        """The sum that the output is added to."""
        return self._by_input(_there(self._residual, "residual")())

    @property
    def entered(self) -> Float[Tensor, "tokens d_out"]:
        """What the block has received."""
        return self._by_input(_there(self._entered, "entered")())

    def _by_input(self, stream: Tensor) -> Tensor:
        return stream.flatten(0, -2) if self.channels == 1 else stream.reshape(-1, 1)

    @property
    def _d_out(self) -> int:
        return _there(self._linear, "output").out_features

    @property
    def dense(self) -> Received:
        """The same tokens at the same place of the dense model."""
        return _there(self._dense, "dense")


class Total:
    """What is known of all tokens when a statistic is finished, beside its own sums."""

    def __init__(self, tokens: int, weight: Tensor, power: Tensor | None) -> None:
        self.tokens: int = tokens
        self.weight: Float[Tensor, "d_out d_in"] = weight  # of the dense map
        self._power = power

    @property
    def power(self) -> Float[Tensor, " d_in"]:
        """E[x̂_j²]; not of producer layers."""
        return _there(self._power, "power")


def required(owner: str, there: Mapping[str, Tensor | None], wanted: Need) -> Tensor:
    """A value that a plug-in asked for.

    Raises:
        PluginError: it is not there; says what is.
    """
    name = wanted if isinstance(wanted, str) else wanted.name
    if (value := there.get(name)) is None:
        have = ", ".join(sorted(key for key, value in there.items() if value is not None)) or "none"
        raise PluginError(
            f"{owner} has no statistic {name!r}: a plug-in has to name it in its `needs`; there are {have}"
        )
    return value


def _there(part: T | None, name: str) -> T:
    if part is None:
        raise PluginError(f"a statistic asked for {name!r}, which is not there; it has to say so in what it `sees`")
    return part
