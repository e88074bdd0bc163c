"""The optimum of an additive table under several constraints at once, by mixed-integer programming."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from prunekit import Allocation, MeasuredMetric, Metric, Space, WrongInput
from prunekit_strategies.allocators.additive import Additive, Table


@dataclass(frozen=True)
class MixedInteger(Additive):
    """One binary unknown for every rung of every site; HiGHS finds the least sum under any number of limits.

        min Σ_ir t_ir x_ir    Σ_r x_ir = 1,   Σ_ir p_ir^m x_ir ≤ limit_m                      (1)

    with p^m the price in metric m. The budget is one limit (one for each kind, when kinds are kept apart), `limits`
    adds more. Next-best solutions come from cuts: with the sites' rungs R of a solution of B sites,

        Σ_i x_{i,R_i} ≤ B - differ                                                            (2)

    so candidates differ in at least `differ` sites. The objective has the last word; the start competes as far as it
    keeps the limits.

    Source: Puzzle (Bercovich et al., arXiv:2411.19146), section 4: replace-one-block scores from the dense model
    (`around: dense`) and a mixed-integer program over parameters and memory. We differ: sites are cut to sizes and
    not replaced, solutions are judged again, and whole numbers are checked in whole numbers.
    """

    limits: tuple[tuple[Metric, float], ...] = ()  # share of the dense sites that may be kept, in any metric
    differ: int = 2  # sites in which candidates must differ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.differ < 1:
            raise ValueError(f"candidates differ in at least 1 site, not {self.differ}")
        if not all(0 < share <= 1 for _, share in self.limits):
            raise ValueError(f"limits are shares in 0..1, not {self.limits}")
        for metric, _ in self.limits:
            if isinstance(metric, MeasuredMetric) and metric.prices is None:
                raise ValueError(
                    f"{metric.unit} is measured for the budget alone; ask for it as the target, other metrics as "
                    "limits, or give the prices that another run has measured: the option prices of the metric"
                )

    def first_space(self, whole: Space) -> Space:
        for metric, _ in self.limits:
            metric.check(whole.sites[0].form.units)
        return super().first_space(whole)

    def last_space(self, whole: Space, best: Allocation) -> Space:
        # what the budget has left might be spent on what a limit forbids
        return whole.zoomed(best, reach=0) if self.limits else super().last_space(whole, best)

    def solutions(self, space: Space, table: Table) -> Iterator[Allocation]:
        """Ascending in their sum, each one that keeps all limits.

        Raises:
            WrongInput: there is none.
        """
        rows, sites, left = self._rows(space), len(space.sites), self.candidates
        columns = [(i, r) for i, ladder in enumerate(space.ladders) for r in range(len(ladder))]
        one = np.array([[float(i == j) for j, _ in columns] for i in range(sites)])
        paid = np.array([[float(prices[i][r]) for i, r in columns] for prices, _ in rows])
        most: Any = [limit for _, limit in rows]
        exact = [LinearConstraint(one, 1, 1), LinearConstraint(paid, ub=most)]
        cost = np.array([table[i][r] for i, r in columns])
        cost, cuts = cost * (1e4 / (np.abs(cost).max() or 1.0)), []  # so that the solver's gap of 1e-6 is nothing
        while left:
            found = milp(
                cost,
                integrality=np.ones(len(columns), dtype=np.int64),
                bounds=Bounds(0, 1),
                constraints=[*exact, *cuts],
                options={"mip_rel_gap": 0.0},
            )  # (1)
            if found.x is None:
                break
            chosen = one * found.x
            rungs = [columns[c][1] for c in chosen.argmax(axis=1)]
            allocation = space.allocation(rungs)
            able = self.keeps(space, allocation)  # in whole numbers: the solver allows itself a little more
            apart = self.differ if able else 1
            cuts.append(LinearConstraint([[float(r == rungs[i]) for i, r in columns]], ub=sites - apart))  # (2)
            if able:
                left -= 1
                yield allocation
        if left == self.candidates:
            said = ", ".join(f"{share:g} of {metric.unit}" for metric, share in self.limits)
            raise WrongInput(f"no allocation keeps the budget and {said}; raise a limit, or lower the sparsity")

    def keeps(self, space: Space, allocation: Allocation) -> bool:
        """Whether an allocation keeps the budget and every limit, in whole numbers."""
        rungs = space.rungs(allocation)
        return all(
            sum(row[r] for row, r in zip(prices, rungs, strict=True)) <= limit for prices, limit in self._rows(space)
        )

    def _rows(self, space: Space) -> list[tuple[list[list[int]], int]]:
        """(price of every rung, limit) for each partition and each limit, in units of the prices' greatest divisor."""
        rows = []
        for members, limit in space.partitions:
            rows.append(([[p * (i in members) for p in row] for i, row in enumerate(space.prices)], limit))
        for metric, share in self.limits:
            prices = [[metric.price(s, k) for k in each] for s, each in zip(space.sites, space.ladders, strict=True)]
            dense = sum(metric.price(site, site.n_groups) for site in space.sites)
            rows.append((prices, math.floor(Fraction(str(share)) * dense)))
        units = [math.gcd(*(p for row in prices for p in row)) or 1 for prices, _ in rows]
        return [
            ([[p // unit for p in row] for row in prices], limit // unit)
            for (prices, limit), unit in zip(rows, units, strict=True)
        ]
