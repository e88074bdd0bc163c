"""One of several processes that make the cells of a comparison: `python -m prunekit.run.worker`.

It is told once which cells of which model there are, opens the model, and then makes one row after the other. It
writes neither rows nor tables, and tells whoever has started it all that is shown (`prunekit/run/beside.py`).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prunekit.errors import CannotGoOn, WrongInput, one_line
from prunekit.run.crew import GRACE, Message, hear_parent
from prunekit.system.ending import Terminated, tidy_ending
from prunekit.system.events import plain, resident
from prunekit.system.progress import Progress, Stage, series_name

Tell = Callable[[Message], None]

EVERY = 1.0  # seconds between two steps of a stage that are told
PATIENCE = 4 * GRACE  # seconds in which one that was here before has ended


def main() -> None:
    """Work until nothing more is asked for."""
    asked, tell = hear_parent()
    try:
        with tidy_ending():
            _work(asked, tell)
    except Terminated:
        pass
    except Exception as error:
        tell(_error(error))
        raise


def _error(error: Exception) -> Message:
    """What the other process needs to raise it again."""
    if isinstance(error, OSError):
        name = None if error.filename is None else str(error.filename)
        return {"error": "OSError", "errno": error.errno, "text": error.strerror or str(error), "filename": name}
    kind = next((each.__name__ for each in (WrongInput, ImportError, CannotGoOn) if isinstance(error, each)), "")
    return {"error": kind, "text": str(error) if kind else f"{type(error).__name__}: {one_line(error)}"}


def _work(asked: queue.SimpleQueue[Message], tell: Tell) -> None:
    import torch
    from filelock import FileLock, Timeout

    from prunekit.run.workplace import LOCK

    told = asked.get()
    torch.set_num_threads(told["threads"])
    folder = Path(told["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=PATIENCE)  # one whose comparison was killed may still be on its way out
    try:
        lock.acquire()
    except Timeout as error:
        raise WrongInput(f"another process works on {folder}; wait for it, or end it") from error
    with lock:
        _make_cells(told, folder, asked, tell)


def _make_cells(told: Message, folder: Path, asked: queue.SimpleQueue[Message], tell: Tell) -> None:
    from prunekit.recipe.resolve import resolve
    from prunekit.recipe.schema import Recipe
    from prunekit.recipe.suite import Cell, Suite
    from prunekit.report.comparison import Row, Rows, row_of
    from prunekit.run.compare import Work, open_bench
    from prunekit.run.grid import Grid
    from prunekit.run.session import Job, keep_prices

    class Held(Rows):
        """Rows that this process knows; another one writes them down."""

        def __init__(self, path: Path, rows: list[Row]) -> None:
            self.path, self.found = path, {row.key: row for row in rows}

        def add(self, row: Row) -> Row:
            return self._keep(row)

    suite, first = Suite.of_mapping(told["suite"]), told["first"]
    cells = [Cell(each["name"], Recipe.of_told(each["recipe"])) for each in told["cells"]]
    recipe = Recipe.of_told(told["base"])
    recipe = recipe.model_copy(update={"memory": _memory(recipe.memory, recipe.device, told["among"])})
    shared = Path(told["shared"]) if first else None
    job = Job(output=folder, progress=Told(tell))
    with open_bench(resolve(recipe), job, folder, told["disk"], shared) as bench:
        found = bench.session.parts.recipe
        if shared is not None:
            keep_prices(found, shared)
        rows = Held(Path(told["rows"]), [] if told["dense"] is None else [row_of(told["dense"])])
        work = Work(bench, suite, cells, told["model"], rows, Grid(suite, rows, folder, Stage(), 1, 1, None), None)
        dense = work.dense()
        known = {key: of for share in told["shares"] for key, of in work.announce(share).items()}
        coming = [
            [*key, recipe, None if pass_ is None else bench.candidates_of(pass_)]
            for key, (recipe, pass_) in known.items()
            if first
        ]
        if first:
            work.warn_of_limit()
        measured = found.model_dump(mode="json", include={"dtype", "metric", "latency"})
        tell({"opened": measured, "dense": asdict(dense), "coming": coming})
        while True:
            cell, sparsity, seed, share = asked.get()["make"]
            tell({"row": asdict(work.make((cell, sparsity, seed, share)))})


def _memory(memory: str | int, device: str, among: int) -> str | int:
    """What the recipe of one of several workers says of memory that they share."""
    from prunekit.models.opening import resolved_devices
    from prunekit.run.plan.make import SPARE
    from prunekit.system.memory import available
    from prunekit.system.sizes import parse_size

    if among == 1:
        return memory
    if (asked := parse_size(memory)) is not None:
        return asked // among
    place = resolved_devices(device)[0]
    held = (resident() or 0) if place.type == "cpu" else 0  # which counts as well
    return held + round(available(place) * SPARE / among)


class Told(Progress):
    """Tells the process that has started this one what is shown."""

    def __init__(self, tell: Tell) -> None:
        self.tell, self.last = tell, 0.0

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        begun = time.perf_counter()
        stage = _ToldStage(self, name, total)
        stage.advance(0)
        yield stage
        self.measured({f"seconds/{series_name(name)}": time.perf_counter() - begun})  # as trackers are told

    @contextmanager
    def part(self, name: str) -> Iterator[Progress]:
        self.tell({"part": name})
        done = False
        try:
            yield self
            done = True
        finally:
            self.tell({"part": None, "done": done})

    def say(self, line: str) -> None:
        self.tell({"say": line})

    def describe(self, settings: Mapping[str, Any]) -> None:
        self.tell({"describe": plain(settings)})

    def measured(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.tell({"measured": {name: float(value) for name, value in values.items()}, "step": step})


class _ToldStage(Stage):
    def __init__(self, told: Told, name: str, total: int) -> None:
        self.told, self.name, self.total, self.done = told, name, total, 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        if (now := time.monotonic()) - self.told.last >= EVERY:
            self.told.last = now
            self.told.tell({"at": f"{self.name} {self.done:,}" + (f"/{self.total:,}" if self.total else "")})

    def expect(self, total: int, seconds: float | None) -> None:
        self.total = total


if __name__ == "__main__":
    main()
