"""Times taken in interleaved rounds.

In every round each has one turn, in an order of its own, so that a machine that slows down does so for all; what is
compared is compared round by round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

from prunekit.system.progress import Progress
from prunekit.system.rates import wait_for

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def interleaved(
    turns: Mapping[K, Callable[[], T]],
    progress: Progress,
    label: str,
    *,
    rounds: int,
    fewest: int,
    seconds: float,
    more_of_first: int = 0,
) -> dict[K, list[T]]:
    """Take turns in rounds, in each in an order of its own.

    Args:
        turns: measures once.
        progress: told of every turn.
        label: of the stage.
        rounds: how many; no further one begins after `seconds`, but for `fewest`.
        fewest: rounds, however long they take.
        seconds: on the wall clock.
        more_of_first: turns that the first has in every round beside its own.

    Returns:
        What every turn gave, in the order of rounds.
    """
    results: dict[K, list[T]] = {key: [] for key in turns}
    order = [*turns, *[next(iter(turns))] * more_of_first]
    started = time.monotonic()
    with progress.stage(label, rounds * len(order)) as stage:
        for each in range(rounds):
            if each >= fewest and time.monotonic() - started > seconds:
                break
            for key in random.Random(each).sample(order, len(order)):
                results[key].append(turns[key]())
                stage.advance()
    return results


def elapsed(run: Callable[[], object], device: torch.device) -> int:
    """Measure the nanoseconds of `run`, with all that it has left to the device.

    Of a computation in one CPU thread it is that thread's time: the same on an idle machine, and on a busy one without
    what other programs take.
    """
    clock = time.thread_time_ns if own_time(device) else time.perf_counter_ns
    wait_for(device)
    started = clock()
    run()
    wait_for(device)
    return clock() - started


def own_time(device: torch.device) -> bool:
    """Whether the clock is that of one CPU thread, not that on the wall."""
    return device.type == "cpu" and torch.get_num_threads() == 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one CPU thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
