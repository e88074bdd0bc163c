"""The cells of one model, made by several processes side by side; this one alone writes rows and shows progress.

Every worker opens the model itself, with its share of devices, threads, memory and disk, in a folder of its own, so
that no two write one calibration pass. The first one to open it says what all others must know alike: the dense model's
row, the dtype and the prices that were measured, and which cells share what.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from prunekit.errors import CannotGoOn, WrongInput
from prunekit.models.opening import every_device
from prunekit.recipe.schema import Recipe
from prunekit.recipe.suite import Cell, Suite
from prunekit.report.comparison import FAILED, Row, row_of
from prunekit.run.crew import Crew, Ended, Message
from prunekit.run.dealing import Deal, Share, Task, find_twin, share_devices, without_twins
from prunekit.run.grid import Column, Key
from prunekit.run.halving import SHARES, WHOLE
from prunekit.run.pace import announcement, seconds_of
from prunekit.run.session import Job
from prunekit.system.progress import Progress
from prunekit.system.sizes import amount

COMMAND = (sys.executable, "-P", "-m", "prunekit.run.worker")
LIVES = 3  # of a worker's place that may end one after the other without a row
EVERY = 1.0  # seconds after which it is looked whether this process was interrupted
LOG = "worker.log"


@dataclass(frozen=True)
class Order:
    """What workers are asked to do."""

    column: Column
    cells: Sequence[Cell]
    base: Recipe  # with the model
    folder: Path  # of the model
    shares: Sequence[Share]  # of the machine, one for every worker
    threads: int  # of each
    disk: int  # bytes of calibration passes that each keeps
    until: float | None  # what the clock says when all has to be done; None: it takes as long as it takes
    asked: int  # workers; fewer are as fast where there are fewer cells

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        where = "; ".join(dict.fromkeys(share.device for share in self.shares))
        fewer = "" if len(self.shares) == self.asked else f"; {self.asked} were asked, for fewer cells"
        return (
            f"{len(self.shares)} workers side by side, each with the model open ({where}), {threads} and "
            f"{amount(self.disk)} of disk for calibration passes{fewer}"
        )


def check_workers(workers: int, suite: Suite, base: Recipe, job: Job) -> None:
    """Refuse several workers where there cannot be any.

    Args:
        workers: how many were asked for.
        suite: what is compared.
        base: the recipe whose machine all cells have.
        job: of the comparison.

    Raises:
        WrongInput: says why, and what to do.
    """
    if workers < 1:
        raise WrongInput(f"workers are 1 or more, not {workers}")
    if workers == 1:
        return
    if job.model is not None:
        raise WrongInput(
            f"{workers} workers open the model themselves, and one in memory cannot be sent to them; save it and give "
            "its folder, or leave workers away"
        )
    if base.engine["name"] != "local":
        raise WrongInput(
            f"engine {base.engine['name']} shares out the work inside a cell, and workers share out the cells of this "
            "machine; give one of them"
        )
    shares = share_devices([*map(str, every_device(base.device))], workers, named=base.device)
    if suite.speed and any(share.among > 1 for share in shares):
        raise WrongInput(
            f"speed times every small model, and of {workers} workers others would be at work on {shares[0].device} "
            "meanwhile; give a device for each, or leave workers or speed away"
        )


def share_out(
    column: Column,
    cells: Sequence[Cell],
    base: Recipe,
    folder: Path,
    workers: int,
    disk: int,
    until: float | None,
) -> Order | None:
    """Divide the machine among workers, no more than there are cells to make.

    Args:
        column: the rows of a model.
        cells: what is compared.
        base: the recipe of all of them, with the model.
        folder: of the model.
        workers: at most.
        disk: bytes of calibration passes that are kept, by all of them together.
        until: what the clock says when all has to be done; None: it takes as long as it takes.

    Returns:
        What they are asked to do; None: there is work for one alone, which this process does.
    """
    missing = {key[:2] if until is not None else key for key in column.whole if column.find(key) is None}
    count = min(workers, len(missing))
    if count < 2:
        return None
    shares = share_devices([*map(str, every_device(base.device))], count, named=base.device)
    threads = max(1, torch.get_num_threads() // count)
    return Order(column, cells, base, folder, shares, threads, disk // count, until, workers)


def make_beside(order: Order, progress: Progress, command: Sequence[str] = COMMAND) -> None:
    """Make all rows of a model that are not there yet.

    Args:
        order: which, and with how many workers.
        progress: what the user is told.
        command: that a worker runs.

    Raises:
        WrongInput, ImportError: the model cannot be opened as it is asked for.
        CannotGoOn: no worker is left.
    """
    progress.say(str(order))
    threads = {name: str(order.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with Crew(command, threads) as crew, ExitStack() as ending:
        together = Together(order, crew, progress)
        ending.callback(together.leave_parts)
        together.run()


@dataclass
class Together:
    """Workers on one model, and what each of them is at. One of the `Makers` of a halving."""

    order: Order
    crew: Crew
    progress: Progress
    deal: Deal = field(default_factory=Deal)
    free: set[int] = field(default_factory=set)  # workers that wait for a task
    opening: set[int] = field(default_factory=set)  # that open the model
    busy: dict[int, Task] = field(default_factory=dict)
    _begun: dict[int, float] = field(default_factory=dict)  # when
    _waiting: list[Task] = field(default_factory=list)  # that nobody has begun
    _done: list[tuple[Row, int]] = field(default_factory=list)  # rows that nobody has asked for yet
    _tasks: dict[Key, Task] = field(default_factory=dict)
    _parts: dict[int, tuple[str, ExitStack, Progress]] = field(default_factory=dict)  # of the progress, by worker
    _lives: dict[int, int] = field(default_factory=dict)  # of a worker's place that have ended, since it made a row
    _gone: set[int] = field(default_factory=set)  # workers that are left out
    _said: set[str] = field(default_factory=set)
    _base: Recipe | None = None  # as the first has opened it; None: it has not
    _dense: Row | None = None

    def run(self) -> None:
        """Make all rows."""
        column, order = self.order.column, self.order
        self._start(0)
        while self._base is None:
            self._hear()
        assert self._dense is not None
        if column.grid.suite.speed:
            self.progress.say(announcement(self._dense, len(column.whole)))
        column.count(self._dense)
        if order.until is None:
            self._make_all()
            return
        for number in range(1, len(order.shares)):
            self._start(number)
        evaluation = self._dense.seconds + seconds_of(self._dense)
        column.halve(self, order.until, evaluation, self.progress.say)

    def _make_all(self) -> None:
        """Every cell on all of the text."""
        column = self.order.column
        for key in column.whole:
            if (known := column.find(key)) is not None:
                column.count(known)
            else:
                self._waiting.append(self._task(key))
        for number in range(1, min(len(self.order.shares), len(without_twins(self._waiting, {})))):
            self._start(number)
        while self._waiting or self.busy:
            for number in sorted(self.free):
                if (task := self.deal.take(number, without_twins(self._waiting, self.busy))) is not None:
                    self._waiting.remove(task)
                    self._begin(number, task)
            foreseen = column.foreseen(task.key for task in (*self._waiting, *self.busy.values()))
            coming = len(self._waiting) + len(self.busy)
            column.grid.expect(coming, None if foreseen is None else foreseen / self.size)
            while not self._hear():
                pass
            self._copy_twins()

    # -- as makers of a halving ------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many workers there are."""
        return max(1, len(self.free) + len(self.opening) + len(self.busy))

    def begin(self, cell: str, sparsity: float, seed: int, share: float) -> None:
        """Begin a row; a worker is free."""
        key = (cell, sparsity, seed, share)
        if (known := self.order.column.find(key)) is not None:
            self._done.append((self.order.column.count(known), 0))
            return
        self._waiting.append(self._task(key))
        self._copy_twins()
        self._begin_waiting()

    def finished(self, *, every: bool = False) -> list[tuple[Row, int]]:
        """Wait until a worker is free, or all that was begun is done."""
        while (self.busy or self._waiting) if every else not self.free:
            if self._hear():
                self._copy_twins()
                self._begin_waiting()
        done, self._done = self._done, []
        return done

    def _begin_waiting(self) -> None:
        """Begin what waits, as far as workers are free: a recipe that is at work under another name is waited for."""
        for task in without_twins(self._waiting, self.busy):
            if self.free:
                self._waiting.remove(task)
                number = self.deal.best(task, sorted(self.free))
                self.deal.give(number, task)
                self._begin(number, task)

    # -- what workers are told -------------------------------------------------------------------------

    def _task(self, key: Key) -> Task:
        return self._tasks.get(key, Task(key))

    def _start(self, number: int) -> None:
        """Start a worker, which opens the model."""
        order, share = self.order, self.order.shares[number]
        folder = order.folder / f"worker-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        self.opening.add(number)
        self.crew.start(number, folder / LOG)
        base, dense = self._base or order.base, self._dense or order.column.dense
        self.crew.tell(
            number,
            {
                "suite": order.column.grid.suite.model_dump(mode="json"),
                "cells": [{"name": cell.name, "recipe": cell.recipe.as_told()} for cell in order.cells],
                "base": base.model_copy(update={"device": share.device}).as_told(),
                "model": order.column.model,
                "folder": str(folder),
                "shared": str(order.folder),
                "rows": str(order.column.grid.rows.path),
                "disk": order.disk,
                "threads": order.threads,
                "among": share.among,
                "shares": [WHOLE] if order.until is None else SHARES,
                "dense": None if dense is None else asdict(dense),
                "first": self._base is None,
            },
        )

    def _begin(self, number: int, task: Task) -> None:
        self.free.remove(number)
        self.busy[number], self._begun[number] = task, time.perf_counter()
        self.crew.tell(number, {"make": task.key})

    # -- what they tell --------------------------------------------------------------------------------

    def _hear(self) -> bool:
        """Wait for what one of them tells, and take note of it.

        Returns:
            Whether a worker came, went or has made a row, so that others may begin.
        """
        if not (self.free or self.busy or self.opening):
            raise CannotGoOn("no worker is left; give fewer --workers, and the same command continues from here")
        while (heard := self.crew.hear(EVERY)) is None:
            pass  # where waiting for ever cannot be interrupted
        number, message = heard
        if isinstance(message, Ended):
            self._ended(number, message)
        elif "error" in message:
            self._broken(number, message)
        elif "opened" in message:
            self._opened(number, message)
        elif "row" in message:
            self._made(number, message)
        else:
            self._show(number, message)
            return False
        return True

    def _opened(self, number: int, message: Message) -> None:
        self.opening.discard(number)
        self.free.add(number)
        if self._base is not None:
            return
        told, column = self.order.base.as_told(), self.order.column
        self._base = Recipe.of_told({**told, "values": {**told["values"], **message["opened"]}})
        for cell, sparsity, seed, share, recipe, reads in message["coming"]:
            key = (cell, sparsity, seed, share)
            self._tasks[key] = Task(key, recipe, reads)
        self._dense = row_of(message["dense"])
        if column.dense is None:
            column.keep(self._dense)

    def _made(self, number: int, message: Message) -> None:
        task, row = self.busy.pop(number), row_of(message["row"])
        self.free.add(number)
        self._lives.pop(number, None)
        self.deal.learn(task, row)
        self._keep(row, number)

    def _keep(self, row: Row, number: int) -> None:
        column = self.order.column
        self._done.append((column.count(column.keep(row)), number))

    def _copy_twins(self) -> None:
        """Make the rows of cells whose recipe another one has come to."""
        for task in [*self._waiting]:
            if (twin := find_twin(task, self.order.column.rows)) is not None:
                self._waiting.remove(task)
                self._keep(twin, 0)

    def _ended(self, number: int, ended: Ended) -> None:
        """A worker has died: its cell has no result, and another one takes its place."""
        if number in self._gone:
            return
        if self._base is None:
            raise CannotGoOn(f"the model could not be opened by a worker: {ended.why}; its log is {ended.log}")
        self._leave_part(number, done=False)
        was_opening = number in self.opening
        self.opening.discard(number)
        self.free.discard(number)
        column = self.order.column
        why = f"{ended.why}; its log is {ended.log.relative_to(column.grid.place)}"
        self._lives[number] = self._lives.get(number, 0) + 1
        if (task := self.busy.pop(number, None)) is not None:
            took = time.perf_counter() - self._begun[number]
            self._keep(Row(column.model, *task.key, state=FAILED, reason=why, wall=took), number)
        if was_opening or self._lives[number] > LIVES:
            self._leave_out(number, why)
        elif self._waiting or self.order.until is not None:
            self._start(number)
        else:
            self.deal.forget(number)

    def _broken(self, number: int, message: Message) -> None:
        """A worker cannot go on, and says why: of the first what one process alone would say, of others a warning."""
        kind, text = message["error"], message["text"]
        if number in self.opening and self._base is not None:
            self.opening.discard(number)
            self._leave_out(number, text)
            return
        if kind == "OSError":
            raise OSError(message["errno"], text, message["filename"])
        known = {"WrongInput": WrongInput, "ImportError": ImportError, "CannotGoOn": CannotGoOn}
        log = self.order.folder / f"worker-{number}" / LOG
        raise known.get(kind, CannotGoOn)(text if kind else f"worker {number}: {text}; its log is {log}")

    def _leave_out(self, number: int, why: str) -> None:
        """Go on with one worker less."""
        self._gone.add(number)
        self.deal.forget(number)
        self.progress.say(f"warning: worker {number} is left out, and the others go on: {why}")

    # -- what is shown ---------------------------------------------------------------------------------

    def _show(self, number: int, message: Message) -> None:
        """Show what a worker tells of what it is at; of its cell as of a part of its own."""
        name, _, part = self._parts.get(number, (f"worker {number}", None, None))
        if "say" in message:
            if message["say"] not in self._said:  # several that open one model say the same
                self._said.add(message["say"])
                self.progress.say(message["say"])
        elif "at" in message:
            self.order.column.grid.note(f"{name}: {message['at']}")
        elif "part" in message and message["part"] is None:
            self._leave_part(number, done=message["done"])
        elif "part" in message:
            stack = ExitStack()
            self._parts[number] = message["part"], stack, stack.enter_context(self.progress.part(message["part"]))
        elif part is not None and "describe" in message:
            part.describe(message["describe"])
        elif "measured" in message and (part is not None or self._base is None):  # opening it is told once
            (part or self.progress).measured(message["measured"], message["step"])

    def _leave_part(self, number: int, *, done: bool) -> None:
        _, stack, _ = self._parts.pop(number, ("", ExitStack(), self.progress))
        with suppress(_NotDone), stack:
            if not done:
                raise _NotDone

    def leave_parts(self) -> None:
        """Say of all that is shown that it did not come to its end."""
        for number in [*self._parts]:
            self._leave_part(number, done=False)


class _NotDone(Exception):
    """What was shown has not come to its end."""
