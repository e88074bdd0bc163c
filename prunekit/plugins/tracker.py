"""Trackers: programs in which a run can be watched, and compared with others, while it goes on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Setting = str | int | float | bool
"""A value of a recipe, as trackers keep it."""


@dataclass(frozen=True)
class Point:
    """A number that was measured."""

    name: str  # letters, digits, dots and underscores, with a slash behind what it belongs to: search_1/loss
    value: float  # inf: of what failed
    step: int  # where on the way: token-forwards of a search, a trial of a study
    at: float  # seconds since 1970


class Track(ABC):
    """One run in a tracker. What is raised here ends the tracking, never the run."""

    @abstractmethod
    def describe(self, settings: Mapping[str, Setting]) -> None:
        """Keep what is run.

        Args:
            settings: by dotted recipe key; they may come in several calls, no key twice.
        """

    @abstractmethod
    def log(self, points: Sequence[Point]) -> None:
        """Keep numbers, in the order in which they were measured."""

    @abstractmethod
    def close(self, *, done: bool) -> None:
        """Write all that is not written, and let go.

        Args:
            done: whether the run came to its end.
        """


class Tracker(ABC):
    """Shows in another program how a run goes on: losses by token-forwards, stages, recipe, result."""

    def check(self) -> None:  # noqa: B027  # most need nothing
        """Refuse, before any work, what is missing on this machine; here nothing.

        Raises:
            WrongInput: says what.
        """

    @abstractmethod
    def open(self, name: str, parent: Track | None) -> Track:
        """Begin a run there; it never takes the place of an earlier one.

        Args:
            name: of the run, as of its folder; of a part, such as a trial, its own.
            parent: the run that it is a part of, of this tracker; None: it is none.
        """
