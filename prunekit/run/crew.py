"""Processes of this machine that work for this one: what they are told and what they tell, as lines of JSON.

    with Crew([sys.executable, "-m", "package.module"], environment) as crew:
        crew.start(0, Path("worker.log"))
        crew.tell(0, {"make": "something"})
        number, message = crew.hear()       # of any of them; an `Ended` where one has died

A process reads its standard input, and ends when that does: when this process has let go of it, or has died, however
that came about. `hear_parent` is the other side. Nothing is pickled, and no process is forked: torch would not live
through it. What a process prints beside its answers goes to its log.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

GRACE = 5.0  # seconds in which a process tidies up when it is to end
LAST_WORDS = 4096  # bytes of a log in which the last line is looked for

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Ended:
    """A process that is gone."""

    code: int  # of its exit; below 0 the signal that ended it
    log: Path

    @property
    def why(self) -> str:
        """In words, as far as it is known."""
        if self.code < 0:
            name = signal.Signals(-self.code).name if -self.code in {*signal.Signals} else f"signal {-self.code}"
            short = ", as the system does where memory is short" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{short}"
        said = _last_line(self.log)
        return f"its process ended with code {self.code}" + (f": {said}" if said else "")


@dataclass
class _Process:
    process: subprocess.Popen[bytes]
    told: IO[bytes]  # its standard input
    log: Path

    def let_go(self) -> None:
        """Close its standard input, by which it ends."""
        with suppress(OSError):  # something was not yet told to one that has died
            self.told.close()


class Crew:
    """Processes by number. They are gone when the block is left."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """
        Args:
            command: that every process runs.
            environment: variables beside those of this process.
        """
        self.command, self.environment = list(command), {**os.environ, **(environment or {})}
        self._processes = dict[int, _Process]()
        self._heard = queue.SimpleQueue[tuple[int, Message | Ended]]()

    def start(self, number: int, log: Path) -> None:
        """Start a process, in the place of one of this number that has ended.

        Args:
            number: by which it is told from others.
            log: file to which all is added that it prints.
        """
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=self.environment
            )
        assert process.stdin is not None
        self._processes[number] = _Process(process, process.stdin, log)
        threading.Thread(target=self._listen, args=(number, self._processes[number]), daemon=True).start()

    def tell(self, number: int, message: Message) -> None:
        """Tell a process something; of one that has died `hear` will tell."""
        told = self._processes[number].told
        with suppress(OSError):
            told.write(json.dumps(message).encode() + b"\n")
            told.flush()

    def hear(self, seconds: float | None = None) -> tuple[int, Message | Ended] | None:
        """Wait for what one of them tells.

        Args:
            seconds: to wait at most; None: as long as it takes.

        Returns:
            (its number, what it says); None: nothing was said in that time.
        """
        try:
            number, message = self._heard.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(message, Ended):
            self._processes.pop(number).let_go()
        return number, message

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._processes.values():
            each.let_go()
        end = time.monotonic() + GRACE + 1
        for each in self._processes.values():
            try:
                each.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()

    def _listen(self, number: int, of: _Process) -> None:
        """Hand on what one process tells, and that it has ended."""
        assert of.process.stdout is not None
        with of.process.stdout as lines:
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:  # the last words of one that was killed
                    continue
                self._heard.put((number, message))
        self._heard.put((number, Ended(of.process.wait(), of.log)))


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_WORDS))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# -- in such a process ------------------------------------------------------------------------------------


def hear_parent() -> tuple[queue.SimpleQueue[Message], Callable[[Message], None]]:
    """Listen to the process that has started this one; when it lets go, or dies, this process gets SIGTERM.

    Ctrl-C is for that process alone. Whatever is printed from here on goes to the log.

    Returns:
        (what it tells, what tells it something).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)
    asked, one = queue.SimpleQueue[Message](), threading.Lock()
    threading.Thread(target=_read, args=(asked,), daemon=True).start()

    def tell(message: Message) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            with one:
                while line:
                    line = line[os.write(answers, line) :]
        except OSError:  # nobody listens any more
            os._exit(1)

    return asked, tell


def _read(asked: queue.SimpleQueue[Message]) -> None:
    begun = b""
    while some := os.read(0, 1 << 16):  # without a buffer: it would be locked when this process ends
        *lines, begun = (begun + some).split(b"\n")
        for line in lines:
            asked.put(json.loads(line))
    os.kill(os.getpid(), signal.SIGTERM)  # the main thread tidies up
    time.sleep(GRACE)
    os._exit(1)
