"""Progress of a long run: stage, step, time left; nothing when quiet.

All of it goes to stderr: stdout is for results.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

EVERY = 5.0  # seconds between two plain lines of a stage


class Stage:
    """One part of a run, with its number of steps; 0: unknown."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps that are done.

        Args:
            steps: how many more.
            note: what the last one was.
        """

    def expect(self, total: int, seconds: float | None) -> None:
        """Correct what was said of the rest, where it is known better than by the pace so far.

        Args:
            total: number of steps, those that are done included.
            seconds: that those to come take; None: that is unknown.
        """


class Progress:
    """Shows nothing. The base class of what does."""

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """Show a stage while it lasts.

        Args:
            name: as it is shown.
            total: number of its steps; 0: unknown.
        """
        yield Stage()

    def say(self, line: str) -> None:
        """Show one line."""

    @contextmanager
    def part(self, name: str) -> Iterator[Progress]:
        """A run within this one, such as a trial of a study, while it lasts.

        Args:
            name: no other part has it.

        Yields:
            What it tells its progress; here the same.
        """
        yield self

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Tell programs what is run, once it is known; nobody is shown anything.

        Args:
            settings: plain values, such as those of a recipe.
        """

    def measured(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Tell programs what was measured; nobody is shown anything.

        Args:
            values: by name, `series_name` of a stage in front where there are several.
            step: where on the way: token-forwards of a search; None: it is of all that was done so far.
        """


class PlainProgress(Progress):
    """Lines for a log file: where a stage stands every few seconds, and its end."""

    def __init__(
        self, file: TextIO | None = None, *, every: float = EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.file, self.every, self.clock = file, every, clock

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        stage = _PlainStage(self, name, total)
        yield stage
        self.say(f"{stage.standing}, done in {span(self.clock() - stage.started)}")

    def say(self, line: str) -> None:
        print(line, file=self.file or sys.stderr, flush=True)


class _PlainStage(Stage):
    def __init__(self, progress: PlainProgress, name: str, total: int) -> None:
        self.progress, self.name, self.total, self.done = progress, name, total, 0
        self.started = self.last_line = progress.clock()
        self.remaining = Remaining()

    @property
    def standing(self) -> str:
        return f"{self.name} {self.done:,}/{self.total:,}" if self.total else f"{self.name} {self.done:,}"

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        now = self.progress.clock()
        if now - self.last_line < self.progress.every or self.done == self.total:  # the end has its own line
            return
        self.last_line = now
        seconds = self.remaining.at(now, self.done, self.total, now - self.started)
        still = "" if seconds is None else f", about {span(seconds)} left"
        self.progress.say(f"{self.standing}{still}" + (f": {note}" if note else ""))

    def expect(self, total: int, seconds: float | None) -> None:
        self.total = total
        self.remaining.set(self.progress.clock(), seconds)


class RichProgress(Progress):
    """Bars that live on a terminal and leave one line behind for each stage."""

    def __init__(self, console: Console | None = None) -> None:
        from rich import progress
        from rich.console import Console

        self.console = console or Console(stderr=True)
        self.bars = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            _remaining_column(),
            progress.TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
            transient=True,
        )
        self.open = 0  # stages under way; the display is there as long as there is one

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        if not self.open:
            self.bars.start()
        self.open += 1
        remaining = Remaining()
        task = self.bars.add_task(name, total=total or None, note="", remaining=remaining)
        started = time.monotonic()
        try:
            yield _RichStage(self, task, remaining)
            self.say(f"✓ {name}, {span(time.monotonic() - started)}")
        finally:
            self.bars.remove_task(task)
            self.open -= 1
            if not self.open:
                self.bars.stop()

    def say(self, line: str) -> None:
        style = "yellow" if line.startswith("warning") else None
        self.console.print(line, style=style, markup=False, emoji=False, highlight=False)


class _RichStage(Stage):
    def __init__(self, progress: RichProgress, task: object, remaining: Remaining) -> None:
        self.progress, self.task, self.remaining = progress, task, remaining

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.progress.bars.update(self.task, advance=steps, **({"note": note} if note else {}))  # type: ignore[arg-type]

    def expect(self, total: int, seconds: float | None) -> None:
        self.progress.bars.update(self.task, total=total or None)  # type: ignore[arg-type]
        self.remaining.set(time.monotonic(), seconds)


class Several(Progress):
    """Shows everything in more than one way."""

    def __init__(self, shown: Sequence[Progress]) -> None:
        self.shown = shown

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        with ExitStack() as stack:
            yield _SeveralStages([stack.enter_context(each.stage(name, total)) for each in self.shown])

    def say(self, line: str) -> None:
        for each in self.shown:
            each.say(line)

    @contextmanager
    def part(self, name: str) -> Iterator[Progress]:
        with ExitStack() as stack:
            yield Several([stack.enter_context(each.part(name)) for each in self.shown])

    def describe(self, settings: Mapping[str, Any]) -> None:
        for each in self.shown:
            each.describe(settings)

    def measured(self, values: Mapping[str, float], step: int | None = None) -> None:
        for each in self.shown:
            each.measured(values, step)


class _SeveralStages(Stage):
    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages

    def advance(self, steps: int = 1, note: str = "") -> None:
        for each in self.stages:
            each.advance(steps, note)

    def expect(self, total: int, seconds: float | None) -> None:
        for each in self.stages:
            each.expect(total, seconds)


_listening: list[Progress] = []  # of the command that this process is


@contextmanager
def listening(progress: Progress) -> Iterator[None]:
    """Within, all that is shown by `progress_for` is told to `progress` as well."""
    _listening.append(progress)
    try:
        yield
    finally:
        _listening.remove(progress)


def progress_for(quiet: bool = False) -> Progress:
    """Choose how progress is shown: bars on a terminal, lines elsewhere, nothing when quiet; and who else is told."""
    drawn = Progress()
    if not quiet and not any(getattr(each, "owns_stderr", False) for each in _listening):
        drawn = RichProgress() if sys.stderr.isatty() else PlainProgress()
    return Several([drawn, *_listening]) if _listening else drawn


def left(done: int, total: int, seconds: float) -> float | None:
    """Estimate the seconds that a stage still takes, which has done so much in so many; None: that is unknown."""
    return seconds / done * (total - done) if done and total > done else None


class Remaining:
    """What a stage still takes: what was said of it, less the time since; by its pace where nothing was said."""

    def __init__(self) -> None:
        self._said: tuple[float, float | None] | None = None

    def set(self, now: float, seconds: float | None) -> None:
        """Say that it takes so many seconds from now on; None: that is unknown."""
        self._said = now, seconds

    def at(self, now: float, done: int, total: int, spent: float) -> float | None:
        """The seconds that are left of a stage that has done so much in so many; None: that is unknown."""
        if self._said is None:
            return left(done, total, spent)
        then, seconds = self._said
        return None if seconds is None else max(0.0, seconds - (now - then))

    @property
    def known(self) -> bool:
        """Whether anything was said."""
        return self._said is not None


def _remaining_column() -> ProgressColumn:
    """The time that is left: what was said of it, or by the pace."""
    from rich.progress import Task, TimeRemainingColumn
    from rich.text import Text

    class Column(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            remaining: Remaining = task.fields["remaining"]
            if not remaining.known:
                return super().render(task)
            seconds = remaining.at(time.monotonic(), 0, 0, 0.0)
            return Text("-:--:--" if seconds is None else span(seconds), style="progress.remaining")

    return Column()


@cache
def warn_once(sentence: str) -> None:
    """Tell the user, once, what a command goes on without."""
    progress_for().say(f"warning: {sentence}")


def series_name(text: str) -> str:
    """A text as a part of the name of what is measured: letters, digits, dots and underscores."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_") or "_"


def span(seconds: float) -> str:
    """Format seconds: 4.2 s, 3:05 min, 2:10 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    return f"{minutes // 60}:{minutes % 60:02} h"
