"""What sub-layers take on one machine: measured times become prices, in whole nanoseconds.

Counts that a larger one beats have no price of their own: they are raised to it.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from prunekit.errors import WrongInput

FILE = "prices.json"  # beside a result, and where a run works
COARSE, FINE = 8, 128  # a sub-layer is timed at about so many counts, and priced at so many


@dataclass(frozen=True)
class Workload:
    """What is timed: `batch` prompts read in one pass, then `new_tokens` tokens each, one by one, from the cache."""

    batch: int
    prompt: int  # tokens
    new_tokens: int

    def __str__(self) -> str:
        reading = f"{self.batch} × {self.prompt} tokens read"
        return f"{reading}, {self.new_tokens} made" if self.new_tokens else reading


@dataclass(frozen=True)
class Curve:
    """The price of every count worth keeping of a sub-layer. Both ascend strictly; the last count is all groups."""

    counts: tuple[int, ...]
    prices: tuple[int, ...]  # nanoseconds above a dropped sub-layer
    sites: int  # of the model that have this shape

    def __post_init__(self) -> None:
        rows = (self.counts, self.prices)
        if len(self.counts) != len(self.prices) or not self.counts or any(min(row) < 0 for row in rows):
            raise ValueError(f"a curve has as many prices as counts, from 0 up, not {self.counts} and {self.prices}")
        if any(a >= b for row in rows for a, b in pairwise(row)):
            raise ValueError(f"counts and prices ascend strictly, not {self.counts} and {self.prices}")

    def price(self, kept: int) -> int:
        """Of a count that is not worth keeping: that of the next one that is."""
        return self.prices[bisect_left(self.counts, kept)]


@dataclass(frozen=True)
class Prices:
    """A price table: what a workload takes on one machine, and which part of it every sub-layer has."""

    workload: Workload
    hardware: Mapping[str, str | int]
    dense: int  # nanoseconds of the dense model
    noise: float  # how far half of the times of one model lie from their median, as a share
    curves: Mapping[str, Curve]  # by shape: sub-layers of one shape share a measurement

    @property
    def outside(self) -> int:
        """Nanoseconds that no sub-layer can free; those of the dense model are exactly these and its sub-layers'."""
        return self.dense - sum(curve.sites * curve.prices[-1] for curve in self.curves.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def of(cls, values: Any, source: str = "latency.prices") -> Prices:
        """A table from plain values.

        Raises:
            WrongInput: they are none.
        """
        try:
            found = _TABLE.validate_python(json.loads(json.dumps(values)))
        except (TypeError, ValueError, RecursionError) as error:
            what = str(error).replace("\n", " ")
            raise WrongInput(f"{source} is no price table of prunekit ({what}); measure anew without it") from error
        if found.outside < 0:
            raise WrongInput(f"{source}: its sub-layers take longer than its model; measure anew without it")
        return found

    @classmethod
    def load(cls, path: str | Path) -> Prices:
        """The table in a file, or in the folder of a result.

        Raises:
            WrongInput: there is none.
        """
        file = Path(path).expanduser()
        file = file / FILE if file.is_dir() else file
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise WrongInput(
                f"there is no price table {str(path)!r}; give one with --set latency.prices=FILE, or measure anew "
                "with --set latency.prices=null"
            ) from error
        except (ValueError, RecursionError) as error:
            raise WrongInput(f"{path} is not JSON; measure anew with --set latency.prices=null") from error
        return cls.of(values, str(path))


_TABLE = TypeAdapter(Prices)


# -- from times to a curve ------------------------------------------------------------------------------


def quanta(n: int) -> list[int]:
    """Powers of two to be tried as the distance of counts, coarsest first: about n / COARSE down to n / FINE."""
    coarse, fine = (max(1, 1 << (max(1, n // parts).bit_length() - 1)) for parts in (COARSE, FINE))
    return [coarse >> j for j in range((coarse // fine).bit_length())]


def places(n: int) -> list[int]:
    """The multiples of the coarsest quantum near a quarter, half and three quarters of n."""
    coarse = quanta(n)[0]
    return sorted({max(1, round(part * n / coarse)) * coarse for part in (0.25, 0.5, 0.75)})


def timed_counts(n: int) -> list[int]:
    """The counts to be timed of n groups: a grid, its refinements at the lower end, and below each of the places."""
    coarse, *finer = quanta(n)
    grid = {0, n, *range(coarse, n, coarse), *finer}
    return sorted(grid | {place - step for place in places(n) for step in finer})


def quantum(times: Mapping[int, int], n: int) -> int:
    """The distance of counts that the hardware can tell apart.

    Halved as long as a count that is an odd multiple of the half saves, against the next multiple of the whole, at
    least half of what its share of the slope promises; else it is padded by the hardware, or lost in the noise.
    """
    coarse, *finer = quanta(n)
    if n == coarse:
        return coarse
    slope = Fraction(times[n] - times[coarse], n - coarse)  # nanoseconds per group
    found = coarse
    for step in finer:
        saved = sum(times[place] - times[place - step] for place in places(n))
        if saved <= 0 or 2 * saved < slope * step * len(places(n)):
            break
        found = step
    return found


def curve(times: Mapping[int, int], n: int, sites: int, scale: Fraction = Fraction(1)) -> Curve:
    """The curve of a shape, from the times of models in which all its `sites` keep the same count.

    A count is dominated where a larger one takes no longer; it is left out. Between two neighbours of the grid that are
    not, multiples of the quantum are interpolated. `scale` takes savings of one shape alone to savings together.
    """
    step = quantum(times, n)
    grid = [k for k in sorted(times) if k % step == 0 or k == n]
    points = {k: times[k] for i, k in enumerate(grid) if all(times[k] < times[more] for more in grid[i + 1 :])}
    for low, high in pairwise(grid):
        if low and low in points and high in points:  # a dropped sub-layer is no point on a line
            rise = times[high] - times[low]
            points |= {k: times[low] + rise * (k - low) // (high - low) for k in range(low + step, high, step)}
    base = times[0]
    # ascending, so that of counts of one price the largest stays
    priced = {max(0, int(scale * (points[k] - base))) // sites: k for k in sorted(points)}
    return Curve(tuple(priced.values()), tuple(priced), sites)


def together(dense: int, alone: Sequence[Sequence[int]], joint: Sequence[int]) -> Fraction:
    """What to multiply savings by: what models that are cut everywhere save, over what the sum of parts promises.

    alone[j]: the times of models of which one shape is cut as in the model that takes joint[j].
    """
    promised = sum(dense - t for times in alone for t in times)
    saved = sum(dense - t for t in joint)
    return Fraction(saved, promised) if promised > 0 and saved > 0 else Fraction(1)
