"""Devices that work on layer problems while the pass goes on: a thread for each, and one that stores what they find.

    with Pool(devices) as pool:
        task = pool.begin(solve)        # waits until a device is free
        pool.end(partial(put, task))    # in the order of these calls, once all of a task is there
        weight = task.made.result()     # what the pass goes on with

A task has two halves: what the pass waits for, and the rest, which is done on the same device behind it. Without
devices both are done by the caller, one thing after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

import torch

from prunekit.system.products import threads_at_work

M = TypeVar("M")
R = TypeVar("R")

Work = Callable[[torch.device | None], tuple[M, Callable[[], R]]]
"""On a device, None: where it is: what is waited for, and what does the rest."""


@dataclass(eq=False)
class Task(Generic[M, R]):
    """What was begun."""

    made: Future[M] = field(default_factory=Future)  # what the pass waits for
    rest: Future[R] = field(default_factory=Future)


class Pool:
    """Devices with a thread each. As many tasks are at work as there are devices, and none waits for one."""

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        """`devices` of this process; (): the caller does everything."""
        self._count, self._free = len(devices), SimpleQueue[torch.device]()
        for device in devices:
            self._free.put(device)
        self._ends = deque[Future[None]]()  # those that nobody has looked at, in order
        self._over = False  # nothing is begun any more
        self._beside = ExitStack()  # what holds while its threads work
        if devices:
            # what torch keeps by thread is as it is here, so that bits are too
            self._grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
            self._threads = ThreadPoolExecutor(len(devices), "prunekit-layer", torch.set_num_threads, (threads,))
            self._last = ThreadPoolExecutor(1, "prunekit-store")

    def begin(self, work: Work[M, R]) -> Task[M, R]:
        """Begin a task as soon as a device is free.

        Raises:
            Exception: what a task, or an end, before this one has raised.
        """
        task = Task[M, R]()
        if not self._count:
            made, rest = work(None)
            task.made.set_result(made)
            task.rest.set_result(rest())
            return task
        while self._ends and (self._ends[0].done() or len(self._ends) >= 2 * self._count):  # which are in memory
            self._ends.popleft().result()
        self._threads.submit(self._do, self._free.get(), work, task)
        return task

    def end(self, close: Callable[[], None]) -> None:
        """Do this, which may wait for tasks, behind what was to be done by the calls before; not if that has failed."""
        if not self._count:
            close()
        else:
            self._ends.append(self._last.submit(self._close, close))

    def __enter__(self) -> Pool:
        if self._count:
            self._beside.enter_context(threads_at_work())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for all ends; raise what the first of them has raised, which in turn would have come before `error`.

        Whoever interrupts the process waits for what is at work, and for no more.
        """
        if not self._count:
            return
        self._beside.callback(self._shut_down)
        with self._beside:
            if kind is None or issubclass(kind, Exception):
                for end in self._ends:
                    with suppress(CancelledError):  # one before it has failed, which was raised
                        end.result()

    def _shut_down(self) -> None:
        self._over = True
        for threads in (self._threads, self._last):
            threads.shutdown(cancel_futures=True)

    def _do(self, device: torch.device, work: Work[M, R], task: Task[M, R]) -> None:
        at = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        try:
            with at, torch.set_grad_enabled(self._grad):
                made, rest = work(device)
                task.made.set_result(made)
                if self._over:
                    raise CancelledError
                task.rest.set_result(rest())
        except BaseException as error:
            for future in (task.made, task.rest):
                if not future.done():
                    future.set_exception(error)
        finally:
            self._free.put(device)

    def _close(self, close: Callable[[], None]) -> None:
        if self._over:
            raise CancelledError
        try:
            close()
        except BaseException:
            self._over = True
            raise
