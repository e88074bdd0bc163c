"""Which worker makes which cell, and what of the machine each may take. Plain data: no process, no model.

Cells that read the same calibration pass go to the worker that has it. One that has nothing to do takes a cell of
another's pass where that is foreseen to be sooner, the pass made a second time. Derived: with P seconds of the pass, t
of a cell beside it, k cells that wait for it and m workers that have it, where

    P + t <= k t / m                                               (1)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean

from prunekit.errors import WrongInput
from prunekit.report.comparison import COMPLETE, Row
from prunekit.run.grid import Key


@dataclass(frozen=True)
class Task:
    """A row that is to be made."""

    key: Key
    recipe: str | None = None  # digest; None: it cannot be resolved, which whoever makes it will say
    reads: str | None = None  # the calibration pass that it shares with others; None: none


@dataclass
class Deal:
    """Who has which calibration pass, and what these take."""

    owners: dict[str, list[int]] = field(default_factory=dict)  # by pass: numbers of workers
    _last: dict[int, str] = field(default_factory=dict)  # by worker: the pass of its last task
    _took: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by pass: (passes, the rest), seconds

    def take(self, worker: int, waiting: Sequence[Task]) -> Task | None:
        """Choose what a worker does next, and count it as its own.

        Args:
            worker: its number.
            waiting: in the order of the grid; of tasks with one recipe at most one.

        Returns:
            One of them; None: all are done sooner by others.
        """
        chosen = self._choose(worker, waiting)
        if chosen is not None:
            self.give(worker, chosen)
        return chosen

    def best(self, task: Task, free: Sequence[int]) -> int:
        """Choose who of those that are free makes a task: one that has its pass, where there is one."""
        there = [worker for worker in free if worker in self.owners.get(task.reads or "", ())]
        return (there or list(free))[0]

    def give(self, worker: int, task: Task) -> None:
        """Count a task as a worker's."""
        if task.reads is not None:
            self._last[worker] = task.reads
            if worker not in (has := self.owners.setdefault(task.reads, [])):
                has.append(worker)

    def forget(self, worker: int) -> None:
        """Count nothing as a worker's any more."""
        self.owners = {pass_: left for pass_, has in self.owners.items() if (left := [w for w in has if w != worker])}

    def learn(self, task: Task, row: Row) -> None:
        """Learn from a row what its pass takes, and the rest."""
        if task.reads is not None and row.state == COMPLETE:
            self._took.setdefault(task.reads, []).append((row.seconds - row.own, row.own))

    def _choose(self, worker: int, waiting: Sequence[Task]) -> Task | None:
        groups = dict[str, list[Task]]()
        for task in waiting:
            groups.setdefault(task.reads or f"alone {task.key}", []).append(task)
        mine = [pass_ for pass_ in groups if worker in self.owners.get(pass_, ())]
        if mine:
            last = self._last.get(worker, "")
            return groups[last if last in mine else mine[0]][0]
        if new := [tasks for pass_, tasks in groups.items() if pass_ not in self.owners]:
            return max(new, key=len)[0]  # the first of the largest: what is left at the end is small
        gains = {pass_: self._gain(pass_, len(tasks)) for pass_, tasks in groups.items()}
        most = max(gains, key=gains.__getitem__, default="")
        return groups[most][0] if gains and gains[most] >= 0 else None

    def _gain(self, pass_: str, waiting: int) -> float:
        """By how many seconds a cell is done sooner by one more worker."""
        passes, rest = self._seconds(pass_)
        return waiting * rest / len(self.owners[pass_]) - (passes + rest)  # (1)

    def _seconds(self, pass_: str) -> tuple[float, float]:
        """What a pass takes, and a cell beside it: as measured of this one, or of others; until then as much each."""
        known = self._took.get(pass_) or [each for some in self._took.values() for each in some]
        if not known:
            return 1.0, 1.0
        return fmean(passes for passes, _ in known), fmean(rest for _, rest in known)


@dataclass(frozen=True)
class Share:
    """What of the machine a worker may take."""

    device: str  # as a recipe names it; several by comma
    among: int  # workers that share the memory of its first device


def share_devices(devices: Sequence[str], workers: int, *, named: str) -> list[Share]:
    """Divide devices among workers: to every one as many, neighbours together; all have the processor.

    Args:
        devices: those that there are to use.
        workers: how many.
        named: what the user has said, for the message.

    Raises:
        WrongInput: there are fewer devices than workers.
    """
    if len(devices) == 1 and devices[0].startswith("cpu"):
        return [Share(devices[0], workers)] * workers
    if len(devices) < workers:
        some = f"{len(devices)} device{'s' * (len(devices) > 1)} ({', '.join(devices)})"
        twice = ",".join([devices[0]] * 2)
        raise WrongInput(
            f"{workers} workers were asked, and --device {named} is {some}; give at most as many workers as devices, "
            f"or a device several times, as in --device {twice}, for workers to share it"
        )
    cuts = [round(i * len(devices) / workers) for i in range(workers + 1)]
    parts = [devices[a:b] for a, b in pairwise(cuts)]
    memories = ["cpu" if part[0].startswith("cpu") else part[0] for part in parts]
    return [Share(",".join(part), memories.count(own)) for part, own in zip(parts, memories, strict=True)]


def without_twins(waiting: Sequence[Task], busy: Mapping[int, Task]) -> list[Task]:
    """The tasks that may begin: of those with one recipe the first, and none while another one is at work."""
    seen, found = {task.recipe for task in busy.values()} - {None}, list[Task]()
    for task in waiting:
        if task.recipe is None or task.recipe not in seen:
            found.append(task)
            seen.add(task.recipe)
    return found


def find_twin(task: Task, rows: Iterable[Row]) -> Row | None:
    """The row of a task whose recipe another cell has come to; None: none has."""
    for row in rows if task.recipe is not None else ():
        if (row.recipe, row.share, row.state) == (task.recipe, task.key[-1], COMPLETE):
            return replace(row, cell=task.key[0], wall=0.0)
    return None
