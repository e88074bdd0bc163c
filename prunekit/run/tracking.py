"""What trackers are told of a command: the progress that everybody else is told, a run for every run within it.

A tracker follows; it never leads. One that fails is let go with a warning, and random state is as if there were none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput, first_line, unknown
from prunekit.plugins.registry import TRACKERS
from prunekit.plugins.tracker import Point, Setting, Track, Tracker
from prunekit.system.progress import Progress, Several, Stage, series_name

EVERY = 5.0  # seconds after which points are handed on
MOST = 1000  # points after which they are, however early
SLOT = "tracker"  # in the keys of --set
MOST_LETTERS = 5000  # of a setting

Spec = str | Mapping[str, Any] | Tracker
"""A tracker: its name, {name: ..., option: value}, or itself."""


def split_options(assignments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell values of the recipe from options of trackers.

    Args:
        assignments: of --set, dotted key -> value.

    Returns:
        (keys of the recipe, [NAME.]option -> value of trackers).
    """
    front = f"{SLOT}."
    options = {key.removeprefix(front): value for key, value in assignments.items() if key.startswith(front)}
    return {key: value for key, value in assignments.items() if not key.startswith(front)}, options


def tracker_specs(names: Sequence[str], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put together what was asked of trackers.

    Args:
        names: of trackers.
        options: NAME.option -> value; where there is one tracker, the option alone says enough.

    Raises:
        WrongInput: there is no such tracker, or an option is of none.
    """
    specs: dict[str, dict[str, Any]] = {}
    for name in names:
        _ = TRACKERS[name]
        specs[name] = {"name": name}
    for key, value in options.items():
        name, _, option = key.rpartition(".")
        name = next(iter(specs)) if not name and len(specs) == 1 else name
        if name not in specs:
            what = unknown("tracker of this run", name, specs) if name else f"trackers are {', '.join(specs) or 'none'}"
            raise WrongInput(f"--set {SLOT}.{key}: {what}; give --track NAME and --set {SLOT}.NAME.{option}=value")
        specs[name][option] = value
    return list(specs.values())


def build_trackers(given: Spec | Sequence[Spec]) -> list[Tracker]:
    """Make trackers, and check that they can work.

    Raises:
        WrongInput: there is no such tracker or option, or something is missing on this machine.
        ImportError: a package is not installed; says which.
    """
    specs = [given] if isinstance(given, str | Mapping | Tracker) else given
    trackers = [TRACKERS.build(spec) for spec in specs]
    for tracker in trackers:
        tracker.check()
    return trackers


@contextmanager
def tracked(progress: Progress, trackers: Sequence[Tracker], output: Path | None) -> Iterator[Progress]:
    """Follow a command.

    Args:
        progress: what the user is told.
        trackers: what is told as well.
        output: folder of the command, by which trackers call it; None: prunekit.

    Yields:
        What the command tells its progress.
    """
    if not trackers:
        yield progress
        return
    name = (output.resolve().name if output is not None else "") or "prunekit"
    following = [_Following(tracker, name, progress.say) for tracker in trackers]
    done = False
    try:
        yield Several([progress, *following])
        done = True
    finally:
        for each in following:
            each.close(done=done)


class _Following(Progress):
    """One tracker, told of one run."""

    def __init__(
        self, tracker: Tracker, name: str, say: Callable[[str], None], parent: _Following | None = None
    ) -> None:
        self.tracker, self.name, self._say, self.parent = tracker, name, say, parent
        self.track: Track | None = None  # opened when there is something to tell
        self.lost = False  # whether the tracker has failed; the outermost knows
        self.step, self._points, self._flushed = 0, list[Point](), time.monotonic()

    # -- what is told -----------------------------------------------------------------------------

    @contextmanager
    def part(self, name: str) -> Iterator[Progress]:
        part = _Following(self.tracker, name, self._say, self)
        done = False
        try:
            yield part
            done = True
        finally:
            part.close(done=done)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        begun = time.perf_counter()
        yield Stage()
        self.measured({f"seconds/{series_name(name)}": time.perf_counter() - begun})

    def describe(self, settings: Mapping[str, Any]) -> None:
        flat = dict(_flat(settings))
        self._call(lambda track: track.describe(flat))

    def measured(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.step = self.step if step is None else step
        now = time.time()
        self._points += [Point(name, float(value), self.step, now) for name, value in values.items()]
        if len(self._points) >= MOST or time.monotonic() - self._flushed >= EVERY:
            self._flush()

    def close(self, *, done: bool) -> None:
        """Tell what was not yet told, and that it is over."""
        self._flush()
        if self.track is not None:
            self._call(lambda track: track.close(done=done))
        self.track = None

    # -- how --------------------------------------------------------------------------------------

    def _flush(self) -> None:
        points, self._points, self._flushed = self._points, [], time.monotonic()
        if points:
            self._call(lambda track: track.log(points))

    def _opened(self) -> Track:
        if self.track is None:
            self.track = self.tracker.open(self.name, None if self.parent is None else self.parent._opened())
        return self.track

    @property
    def _root(self) -> _Following:
        return self if self.parent is None else self.parent._root

    def _call(self, what: Callable[[Track], None]) -> None:
        """Tell the tracker; what it raises ends the tracking of the whole command."""
        root = self._root
        if root.lost:
            return
        try:
            with same_randomness():
                what(self._opened())
        except (Exception, SystemExit) as error:
            root.lost = True
            who = TRACKERS.name_of(self.tracker) or type(self.tracker).__name__
            said = f"{type(error).__name__}: {first_line(error)}"
            self._say(f"warning: tracker {who} has failed ({said}); the run goes on without it")


@contextmanager
def same_randomness() -> Iterator[None]:
    """Within, somebody may draw random numbers; afterwards the next ones are those that would have come."""
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Setting]]:
    """Dotted key -> value, lists by number; what was not said is left out."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{i}" if key else str(i))
    elif isinstance(value, str):
        yield key, value[:MOST_LETTERS]
    elif isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        yield key, value
    elif value is not None:
        yield key, str(value)[:MOST_LETTERS]
