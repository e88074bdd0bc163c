"""The progress of a command for programs: one JSON object a line, of the same stages and steps that people see.

    {"event": "begin", "schema": 1, "command": "prune", "version": "0.1.0", "pid": 4711, "at": 0.0}
    {"event": "progress", "stage": "calibration", "within": [], "state": "running", "done": 12, "of": 48,
     "estimate": 31.5, "seconds": 10.5, "memory": 812646400, "note": "model.layers.5.mlp", "at": 14.2}
    {"event": "message", "text": "warning: ...", "at": 15.0}
    {"event": "describe", "part": "", "settings": {"model": ..., "sparsity": 0.5}, "at": 16.0}
    {"event": "measured", "part": "", "step": 8192, "values": {"search_1/loss": 0.31}, "at": 17.0}
    {"event": "end", "status": "done", "code": 0, "result": {...}, "error": null, "at": 61.9}

Every line is written by one call, whole, so that a reader sees no half of one. Numbers that are not finite are null.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput
from prunekit.system.progress import Progress, Remaining, Stage

SCHEMA = 1
EVERY = 1.0  # seconds between two steps of a stage that are told; its begin and its end always are
MOST_LETTERS = 1000  # of a note or a message
STDOUT, STDERR = 1, 2
STATUS: Mapping[int, str] = {0: "done", 1: "failed", 2: "refused"}  # by exit code; all others: interrupted

Write = Callable[[bytes], object]


class Events(Progress):
    """Tells stages, lines and the end of a command as events."""

    def __init__(
        self,
        write: Write,
        *,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
        owns_stderr: bool = False,
    ) -> None:
        """
        Args:
            write: takes one line, as bytes.
            every: seconds between two steps of a stage.
            clock: seconds.
            owns_stderr: whether standard error holds nothing else.
        """
        self._write: Write | None = write
        self.every, self.clock, self.owns_stderr = every, clock, owns_stderr
        self._began, self._open = clock(), list[str]()  # stages under way, the outermost first

    def begin(self, command: str) -> None:
        """Tell that a command begins.

        Raises:
            WrongInput: nobody can be told.
        """
        version = metadata.version("prunekit")
        self._tell("begin", {"schema": SCHEMA, "command": command, "version": version, "pid": os.getpid()})
        if self._write is None:
            raise WrongInput("--json-lines: nothing can be written there; give a file, or an open descriptor")

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        stage = _EventStage(self, name, total, tuple(self._open))
        self._open.append(name)
        state = "stopped"
        stage.tell("begun")
        try:
            yield stage
            state = "done"
        finally:
            self._open.pop()
            stage.tell(state)

    def say(self, line: str) -> None:
        self._tell("message", {"text": line[:MOST_LETTERS]})

    @contextmanager
    def part(self, name: str) -> Iterator[Progress]:
        yield _EventPart(self, name)

    def describe(self, settings: Mapping[str, Any]) -> None:
        self._tell("describe", {"part": "", "settings": settings})

    def measured(self, values: Mapping[str, float], step: int | None = None) -> None:
        self._tell("measured", {"part": "", "step": step, "values": values})

    def end(self, code: int, result: object = None, error: str | None = None) -> None:
        """Tell how it ended; nothing is told after that.

        Args:
            code: that the process exits with.
            result: plain values, of a command that is done.
            error: one sentence.
        """
        status = STATUS.get(code, "interrupted")
        self._tell("end", {"status": status, "code": code, "result": result, "error": error})
        self._write = None

    def _tell(self, event: str, values: Mapping[str, object]) -> None:
        if self._write is None:
            return
        try:
            self._write(encode({"event": event, **values, "at": round(self.clock() - self._began, 3)}))
        except (OSError, ValueError):  # the reader has gone, the disk is full: the work is worth more
            self._write = None
            if not self.owns_stderr:
                print("warning: --json-lines cannot be written any more; the run goes on", file=sys.stderr, flush=True)


class _EventPart(Progress):
    """A run within a command: its events say its name."""

    def __init__(self, events: Events, name: str) -> None:
        self.events, self.name = events, name

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        with self.events.stage(name, total) as stage:
            yield stage

    def say(self, line: str) -> None:
        self.events.say(line)

    @contextmanager
    def part(self, name: str) -> Iterator[Progress]:
        yield _EventPart(self.events, f"{self.name}/{name}")

    def describe(self, settings: Mapping[str, Any]) -> None:
        self.events._tell("describe", {"part": self.name, "settings": settings})

    def measured(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.events._tell("measured", {"part": self.name, "step": step, "values": values})


class _EventStage(Stage):
    def __init__(self, events: Events, name: str, total: int, within: tuple[str, ...]) -> None:
        self.events, self.name, self.total, self.within = events, name, total, within
        self.done, self.note = 0, ""
        self.started = self.told = events.clock()
        self.remaining = Remaining()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.note = note or self.note
        if self.events.clock() - self.told >= self.events.every:
            self.tell("running")

    def expect(self, total: int, seconds: float | None) -> None:
        self.total = total
        self.remaining.set(self.events.clock(), seconds)

    def tell(self, state: str) -> None:
        """Tell where it stands."""
        self.told = self.events.clock()
        seconds = self.told - self.started
        estimate = 0.0 if state == "done" else self.remaining.at(self.told, self.done, self.total, seconds)
        self.events._tell(
            "progress",
            {
                "stage": self.name, "within": self.within, "state": state, "done": self.done, "of": self.total or None,
                "estimate": None if estimate is None else round(estimate, 3), "seconds": round(seconds, 3),
                "memory": resident(), "note": self.note[:MOST_LETTERS],
            },
        )  # fmt: skip


def open_events(place: str) -> Events:
    """Open where events go.

    Args:
        place: a file, to which they are added; or the number of a descriptor that is open: 2 is standard error, which
            then holds nothing else, and what is written there by others becomes messages.

    Raises:
        WrongInput: it cannot be written.
    """
    if not place.isascii() or not place.isdigit():
        return Events(_of_file(Path(place)))
    descriptor = int(place)
    if descriptor == STDOUT:
        raise WrongInput("--json-lines 1 would mix with the results; give 2, another open descriptor, or a file")
    try:
        os.fstat(descriptor)
    except (OSError, OverflowError):
        raise WrongInput(
            f"--json-lines {place}: no such descriptor is open; open it, as in 3>progress.jsonl, or give a file"
        ) from None
    return Events(lambda line: _write_all(descriptor, line), owns_stderr=descriptor == STDERR)


def _of_file(path: Path) -> Write:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if _ends_in_half_a_line(path):
            os.write(descriptor, b"\n")  # of a process that was killed
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WrongInput(f"--json-lines {path} cannot be written: {reason}; choose another file") from None
    return lambda line: _write_all(descriptor, line)


def _ends_in_half_a_line(path: Path) -> bool:
    """Whether the last line of a file is not whole."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _write_all(descriptor: int, line: bytes) -> None:
    while line:
        line = line[os.write(descriptor, line) :]


def encode(event: object) -> bytes:
    """One line of JSON in ASCII; what JSON does not have becomes null or text."""
    return json.dumps(plain(event), allow_nan=False).encode() + b"\n"


def plain(value: Any) -> Any:
    """A value as JSON can say it."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # a number of numpy
        return plain(value.item())
    return str(value)


def resident() -> int | None:
    """Bytes of memory that this process holds on the host; None: the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most it has held
    return most if sys.platform == "darwin" else most * 1024


class Messages(io.TextIOBase):
    """In the place of `sys.stderr`: every line that anybody writes becomes a message."""

    encoding = "utf-8"

    def __init__(self, events: Events) -> None:
        self._events, self._begun = events, ""

    def write(self, text: str) -> int:
        """Tell all lines that are whole."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self._events.say(line)
        return len(text)

    def finish(self) -> None:
        """Tell what stands behind the last line."""
        if self._begun:
            self.write("\n")

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """For those who ask for the descriptor: what they write is beyond our reach."""
        return STDERR
