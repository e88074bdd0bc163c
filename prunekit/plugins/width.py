"""Widths: which directions of the residual stream stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from jaxtyping import Float, Int64
from torch import Tensor

AUTO = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares that are tried where nobody says which


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

    share: float | tuple[float, ...] | Literal["auto"] = 1.0  # of what is removed in all, that goes with the width;
    # groups make up the rest, exactly. Several, ascending, or auto: each is searched, and the objective decides
    step: int = 8  # what the width is a multiple of

    def __post_init__(self) -> None:
        several = self.share == "auto" or isinstance(self.share, tuple)
        if isinstance(self.share, str) and self.share != "auto":
            raise ValueError(f"share is a number, several of them, or auto, not {self.share!r}")
        if several and not (
            len(self.shares) > 1
            and all(0 <= share <= 1 for share in self.shares)
            and all(low < high for low, high in pairwise(self.shares))
        ):
            raise ValueError(
                f"several shares are two or more, ascending, from 0, which leaves the width as it is, to 1, not "
                f"{list(self.shares)}"
            )
        if not several and not 0 < self.shares[0] <= 1:
            raise ValueError(f"share is more than 0 and at most 1, not {self.share}")
        if self.step < 1:
            raise ValueError(f"step is a number of channels, 1 or more, not {self.step}")

    @property
    def shares(self) -> tuple[float, ...]:
        """All that are tried, ascending; one, where there is no choice."""
        if isinstance(self.share, str):
            return AUTO
        return self.share if isinstance(self.share, tuple) else (self.share,)

    @abstractmethod
    def directions(self, stream: ResidualStream) -> Float[Tensor, "d d"] | Int64[Tensor, " d"]:
        """Rank the directions of the stream; how many stay follows from the budget.

        Args:
            stream: its statistics over the calibration tokens; they are not changed.

        Returns:
            An order of the channels, the most important first; or, where it `turns`, an orthonormal basis in float64,
            a direction in each column.
        """
