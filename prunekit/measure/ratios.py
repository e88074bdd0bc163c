"""What may be said of measurements in spite of noise: their spread, and ratios of pairs with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 6  # pairs that an interval takes: with five, chance alone gives one side of 1 more often than ERROR
ERROR = 0.05  # of all intervals miss the true ratio


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

    @classmethod
    def together(cls, ratios: Sequence[Ratio]) -> Ratio:
        """One for several, such as of seeds: their median, and an interval that holds all of theirs.

        So a difference is clear where it is clear in each of them, and the same way.
        """
        median = statistics.median(ratio.median for ratio in ratios)
        return cls(median, min(ratio.low for ratio in ratios), max(ratio.high for ratio in ratios))

    @property
    def clear(self) -> bool:
        """Whether the noise leaves no doubt that there is a difference."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})" if self.clear else "no difference beyond noise"
