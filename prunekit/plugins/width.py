"""Widths: which directions of the residual stream stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """What calibration tells of the residual stream: of what every norm receives and makes, in order of execution, the
    norm in front of the head last."""

    absolute: Float[Tensor, "norms d"]  # root mean square over windows of the mean |output| over tokens; float64
    gram: Float[Tensor, "d d"] | None = None  # Σ over norms of E[x xᵀ / rms(x)²], x the input; None: for an order


@dataclass(frozen=True)
class Width(ABC):
    """Narrows the residual stream, before anything else is removed."""

    turns: ClassVar[bool] = False
    """Whether it answers with a basis: embedding and head then are two matrices, also where they were one."""

    share: float = 1.0  # of what is removed in all, that goes with the width; groups make up the rest, exactly
    step: int = 8  # what the width is a multiple of

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is more than 0 and at most 1, not {self.share}")
        if self.step < 1:
            raise ValueError(f"step is a number of channels, 1 or more, not {self.step}")

    @abstractmethod
    def directions(self, stream: ResidualStream) -> Float[Tensor, "d d"] | Int64[Tensor, " d"]:
        """Rank the directions of the stream; how many stay follows from the budget.

        Args:
            stream: its statistics over the calibration tokens; they are not changed.

        Returns:
            An order of the channels, the most important first; or, where it `turns`, an orthonormal basis in float64,
            a direction in each column.
        """
