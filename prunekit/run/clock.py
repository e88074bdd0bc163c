"""What the stages of a run take, in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by stage: its own, and those of a clock that it shares with others."""

    def __init__(self, shared: Clock | None = None) -> None:
        self.own: dict[str, float] = {}
        self.passes: dict[str, float] = {}  # of these, calibration passes by what makes them, which runs may share
        self.shared = shared or self

    @property
    def seconds(self) -> dict[str, float]:
        """What it takes to come so far alone: shared ones are included."""
        both = dict(self.shared.own) if self.shared is not self else {}
        return both | {stage: spent + both.get(stage, 0.0) for stage, spent in self.own.items()}

    @property
    def all_passes(self) -> dict[str, float]:
        """Seconds of the calibration passes that `seconds` counts."""
        return (dict(self.shared.passes) if self.shared is not self else {}) | self.passes

    def add_pass(self, stage: str, name: str, seconds: float) -> None:
        """Count a calibration pass, once: a run that reads what it has made itself has not made it again."""
        if name in self.passes:
            return
        self.add(stage, seconds)
        self.passes[name] = seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - started)

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds of a stage; a calibration pass that is only read counts as when it was made."""
        self.own[stage] = self.own.get(stage, 0.0) + seconds
