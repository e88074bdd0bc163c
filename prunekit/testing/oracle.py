"""The exact optimum of an additive table, to measure allocators against."""

import math
from collections.abc import Sequence

import numpy as np

from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation


def best_allocation(space: Space, errors: Sequence[Sequence[float]]) -> tuple[Allocation, float]:
    """The allocation of least Σ_i errors[i][r_i] under the exact budget, and that sum.

    Dynamic programming over sites and money, with f_i[c] the least sum of the first i sites for at most c:

        f_i[c] = min_r f_{i-1}[c - p_ir] + errors[i][r]                                       (1)

    Prices count from the lowest rungs, in units of their greatest common divisor g. Time is
    sites x rungs x limit / g: seconds for a small model, and for a large one as long as g is.

    Raises:
        ValueError: even the lowest rungs cost too much.
    """
    rungs = [0] * len(space.sites)
    for members, limit in space.partitions:
        extra = {i: [p - space.prices[i][0] for p in space.prices[i]] for i in members}
        unit = math.gcd(*(p for steps in extra.values() for p in steps)) or 1
        most = sum(steps[-1] for steps in extra.values())
        money = min(limit - sum(space.prices[i][0] for i in members), most) // unit
        if money < 0:
            raise ValueError(f"the lowest rungs cost more than the budget of {limit:,} {space.budget.metric.unit}")

        f = np.zeros(money + 1)
        choices = {}
        for i in members:
            options = np.full((len(extra[i]), money + 1), np.inf)
            for r, price in enumerate(extra[i]):
                if (p := price // unit) <= money:
                    options[r, p:] = f[: money + 1 - p] + errors[i][r]
            choices[i], f = options.argmin(axis=0), options.min(axis=0)  # (1)

        for i in reversed(members):
            rungs[i] = int(choices[i][money])
            money -= extra[i][rungs[i]] // unit
    return space.allocation(rungs), math.fsum(row[r] for row, r in zip(errors, rungs, strict=True))
