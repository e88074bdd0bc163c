"""Times taken in interleaved rounds, and what may be said of them in spite of noise.

In every round each has one turn, in an order of its own, so that a machine that slows down does so for all; what is
compared is compared round by round.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from prunekit.system.progress import Progress
from prunekit.system.rates import wait_for

FEWEST = 6  # pairs that an interval takes: with five, chance alone gives one side of 1 more often than ERROR
ERROR = 0.05  # of all intervals miss the true ratio

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and the range of the half of them in the middle; in their unit."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The quartiles of at least one measurement."""
        low, median, high = statistics.quantiles([*values] * (1 + (len(values) == 1)), n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        digits = 1 if self.median < 1000 else 0
        return f"{self.median:,.{digits}f} ±{(self.high - self.low) / 2 / self.median:.1%}"


@dataclass(frozen=True)
class Ratio:
    """The median of ratios pair by pair, and the interval of the sign test, which assumes no shape of the noise."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], base: Sequence[float]) -> Ratio:
        """`values` over `base`; those of the same place were measured in the same round.

        Raises:
            ValueError: they are not as many, or fewer than `FEWEST`.
        """
        ratios = sorted(a / b for a, b in zip(values, base, strict=True))
        if (n := len(ratios)) < FEWEST:
            raise ValueError(f"an interval takes {FEWEST} pairs, not {n}")
        # the true median lies below the k-th smallest, or above the k-th largest, as often as n tosses have < k heads
        chances = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, n // 2 + 1)]
        k = sum(chance <= ERROR for chance in chances)
        return cls(statistics.median(ratios), ratios[k - 1], ratios[n - k])

    @property
    def clear(self) -> bool:
        """Whether the noise leaves no doubt that there is a difference."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})" if self.clear else "no difference beyond noise"


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
