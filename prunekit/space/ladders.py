"""What can be cut, how much of it is kept, and what that costs.

Integers only: a share appears where a user types it and becomes a count of kept groups here, once.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, pairwise, permutations

from prunekit.space.budgets import Budget
from prunekit.space.sites import Allocation, Site


@dataclass(frozen=True)
class Space:
    """Which counts each site may keep (its ladder of rungs) under one exact budget."""

    sites: tuple[Site, ...]
    ladders: tuple[tuple[int, ...], ...]  # kept counts, ascending
    budget: Budget
    stride: float = 0.0  # distance of rungs as a share of a site's groups; 0: every count

    def __post_init__(self) -> None:
        if len(self.sites) != len(self.ladders):
            raise ValueError(f"{len(self.sites)} sites need as many ladders, not {len(self.ladders)}")
        for site, ladder in zip(self.sites, self.ladders, strict=True):
            if not ladder or list(ladder) != sorted(set(ladder)) or ladder[0] < 0 or ladder[-1] > site.n_groups:
                raise ValueError(f"{site.name}: a ladder ascends within 0..{site.n_groups}, not {ladder}")
            if site.step > 1 and any(kept % site.step for kept in ladder):
                raise ValueError(f"{site.name}: counts are multiples of {site.step}, not {ladder}")

    @classmethod
    def whole(cls, sites: Sequence[Site], budget: Budget) -> Space:
        """Every count of every site that is worth keeping."""
        return cls(tuple(sites), tuple(tuple(budget.counts(s)) for s in sites), budget)

    # -- prices ---------------------------------------------------------------------------------

    @cached_property
    def prices(self) -> tuple[tuple[int, ...], ...]:
        """Price of every rung, aligned with `ladders`."""
        return tuple(
            tuple(self.budget.price(site, kept) for kept in ladder)
            for site, ladder in zip(self.sites, self.ladders, strict=True)
        )

    @cached_property
    def partitions(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """(site indices, limit) of every budget partition; every site is in one."""
        if not self.budget.by_kind:
            return ((tuple(range(len(self.sites))), self.budget.limit),)
        return tuple(
            (tuple(i for i, s in enumerate(self.sites) if s.kind == kind), limit) for kind, limit in self.budget.by_kind
        )

    @cached_property
    def open_partitions(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """`partitions` of the sites that are not spared, the limits less what those cost that are."""
        found = []
        for members, limit in self.partitions:
            whole = [i for i in members if self.sites[i].spared]
            spent = sum(self.budget.price(self.sites[i], self.sites[i].n_groups) for i in whole)
            found.append((tuple(i for i in members if i not in whole), limit - spent))
        return tuple(found)

    def cost(self, allocation: Allocation) -> int:
        """Price of an allocation, in units of the budget's metric."""
        return sum(self.budget.price(s, k) for s, k in zip(self.sites, allocation, strict=True))

    def is_feasible(self, allocation: Allocation) -> bool:
        """Whether every count is a rung and every budget partition within its limit."""
        if len(allocation) != len(self.sites) or any(
            k not in at for k, at in zip(allocation, self._positions, strict=True)
        ):
            return False
        rungs = self.rungs(allocation)
        return all(self._spare(rungs, *partition) >= 0 for partition in self.partitions)

    def is_probe(self, allocation: Allocation) -> bool:
        """Whether every count is a rung or all groups of its site; the price may be any."""
        return len(allocation) == len(self.sites) and all(
            k in position or k == site.n_groups
            for k, position, site in zip(allocation, self._positions, self.sites, strict=True)
        )

    def rungs(self, allocation: Allocation) -> tuple[int, ...]:
        """Position of every count on its ladder."""
        return tuple(position[k] for k, position in zip(allocation, self._positions, strict=True))

    def allocation(self, rungs: Sequence[int]) -> Allocation:
        """Inverse of `rungs`."""
        return tuple(ladder[r] for r, ladder in zip(rungs, self.ladders, strict=True))

    # -- from a relaxed target to a feasible allocation -----------------------------------------------

    def nearest(self, target: Sequence[float]) -> Allocation:
        """The allocation nearest to a relaxed target that spends the budget.

        All targets of a partition move by one common share of their sites until the rounded counts just
        fit; what is left goes, rung by rung, to the sites that are furthest below their target. The
        result is tight: no site can be raised by one rung. A feasible, tight allocation is its own
        nearest. Only a common shift is applied, so targets that differ by one are the same target.

        Args:
            target: kept groups of every site, any real numbers.

        Raises:
            ValueError: the target has the wrong length or is not finite, or even the lowest rungs cost too much.
        """
        if len(target) != len(self.sites) or not all(map(math.isfinite, target)):
            raise ValueError(f"a target is {len(self.sites)} finite numbers of kept groups, not {list(target)}")
        share = [t / s.n_groups for t, s in zip(target, self.sites, strict=True)]
        rungs = [0] * len(self.sites)
        for members, limit in self.partitions:
            shift = self._shift(share, members, limit)
            for i in members:
                rungs[i] = self._rung(i, share[i] + shift)
            self._fill(rungs, members, limit, [s + shift for s in share])
        return self.allocation(rungs)

    def uniform(self) -> Allocation:
        """The same share of every site, as near as the ladders allow."""
        return self.nearest([s.n_groups / 2 for s in self.sites])

    def _rung(self, i: int, share: float) -> int:
        """The rung nearest to a share of site i; the lower one on a tie."""
        return bisect_left(self._middles[i], share * self.sites[i].n_groups)

    @cached_property
    def _middles(self) -> tuple[tuple[float, ...], ...]:
        """Half-way points between neighbouring rungs."""
        return tuple(tuple((low + high) / 2 for low, high in pairwise(ladder)) for ladder in self.ladders)

    @cached_property
    def _positions(self) -> tuple[dict[int, int], ...]:
        """Count -> rung."""
        return tuple({k: r for r, k in enumerate(ladder)} for ladder in self.ladders)

    def _spare(self, rungs: Sequence[int], members: Sequence[int], limit: int) -> int:
        return limit - sum(self.prices[i][rungs[i]] for i in members)

    def _shift(self, share: Sequence[float], members: Sequence[int], limit: int) -> float:
        def fits(shift: float) -> bool:
            return sum(self.prices[i][self._rung(i, share[i] + shift)] for i in members) <= limit

        reach = 2.0 + max((abs(share[i]) for i in members), default=0.0)
        low, high = -reach, reach
        if not fits(low):
            least = sum(self.prices[i][0] for i in members)
            raise ValueError(f"the lowest rungs cost {least:,} {self.budget.metric.unit}; the budget is {limit:,}")
        if fits(high):
            return high
        if fits(0.0):
            low = 0.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _fill(self, rungs: list[int], members: Sequence[int], limit: int, share: Sequence[float]) -> None:
        """Raise sites in place, the one furthest below its share first, while a rung still fits."""
        spare = self._spare(rungs, members, limit)

        def want(i: int) -> float:
            ladder, r = self.ladders[i], rungs[i]
            return (share[i] * self.sites[i].n_groups - ladder[r]) / (ladder[r + 1] - ladder[r])

        while open_ := [i for i in members if rungs[i] + 1 < len(self.ladders[i]) and self._step(i, rungs[i]) <= spare]:
            i = max(open_, key=lambda i: (want(i), -i))
            spare -= self._step(i, rungs[i])
            rungs[i] += 1

    def _step(self, i: int, r: int) -> int:
        """Price of going from rung r of site i to the next."""
        return self.prices[i][r + 1] - self.prices[i][r]

    # -- neighbours ---------------------------------------------------------------------------------

    def swap(self, here: Allocation, up: int, down: int) -> Allocation | None:
        """A neighbour by one swap: one rung of the dearer site, what it pays for of the cheaper.

        Args:
            here: a feasible allocation.
            up: index of the site that gains.
            down: index of the site that loses.

        Returns:
            A tight allocation; what is left over of the price went to other sites of the partition. None when the
            ladders or the partitions do not allow it.
        """
        rungs = self.rungs(here)
        moved = self._trade(rungs, self._spare(rungs, *self.partitions[self._partition_of[up]]), up, down)
        if moved is None:
            return None
        return tuple(self.ladders[i][moved[i]] if i in moved else k for i, k in enumerate(here))

    def _trade(self, rungs: Sequence[int], spare: int, up: int, down: int) -> dict[int, int] | None:
        """The rungs that a swap changes, given what the partition has to spare; None where it is not possible."""
        if up == down or self._partition_of[up] != self._partition_of[down]:
            return None
        high, low = rungs[up] + 1, rungs[down] - 1
        if high >= len(self.ladders[up]) or low < 0:
            return None
        spare += self._step(down, low) - self._step(up, high - 1)
        while spare < 0:
            if low == 0:
                return None
            low -= 1
            spare += self._step(down, low)
        while high + 1 < len(self.ladders[up]) and self._step(up, high) <= spare:
            spare -= self._step(up, high)
            high += 1
        moved = {up: high, down: low}
        p = self._partition_of[up]
        members, _ = self.partitions[p]
        raised = spare >= self._cheapest[p]
        while raised:  # one rung each in turn, so that the result is tight again
            raised = False
            for i in members:
                r = moved.get(i, rungs[i])
                if i != down and r + 1 < len(self.ladders[i]) and self._step(i, r) <= spare:
                    spare -= self._step(i, r)
                    moved[i] = r + 1
                    raised = True
        return moved

    @cached_property
    def _partition_of(self) -> dict[int, int]:
        """Position in `partitions` of every site."""
        return {i: p for p, (members, _) in enumerate(self.partitions) for i in members}

    @cached_property
    def _cheapest(self) -> list[int]:
        """Price of the cheapest step on any ladder of every partition."""
        steps = [[self._step(i, r) for r in range(len(ladder) - 1)] for i, ladder in enumerate(self.ladders)]
        return [min((price for i in members for price in steps[i]), default=0) for members, _ in self.partitions]

    def swaps(self, here: Allocation) -> Iterator[Allocation]:
        """All neighbours of an allocation by one swap, each once."""
        seen = {here}
        for up, down in permutations(range(len(self.sites)), 2):
            there = self.swap(here, up, down)
            if there is not None and there not in seen:
                seen.add(there)
                yield there

    def lowest(self, table: Sequence[Sequence[float]]) -> Allocation:
        """A tight allocation with a low sum of table[i][r] over the sites: near the optimum, not always it.

        Every site takes its rung of least table[i][r] + λ price, λ as small as the partition allows; then
        swaps lower the sum until none does.
        """
        table = [[min(t, 1e300) for t in row] for row in table]  # differences of inf would be nan
        bids = [0] * len(self.sites)
        for members, limit in self.partitions:
            for i, r in zip(members, self._bids(table, members, limit), strict=True):
                bids[i] = r
        rungs = list(self.rungs(self.nearest(self.allocation(bids))))
        spare = [self._spare(rungs, *partition) for partition in self.partitions]
        pairs = [(up, down) for members, _ in self.partitions for up, down in permutations(members, 2)]
        idle = 0
        for up, down in cycle(pairs):
            p = self._partition_of[up]
            moved = self._trade(rungs, spare[p], up, down) or {}
            terms = [t for i, r in moved.items() for t in (table[i][r], -table[i][rungs[i]])]
            idle += 1
            if math.fsum(terms) < 0:  # the exact sign: never in circles
                for i, r in moved.items():
                    rungs[i] = r
                spare[p], idle = self._spare(rungs, *self.partitions[p]), 0
            if idle == len(pairs):
                break
        return self.allocation(rungs)

    def _bids(self, table: Sequence[Sequence[float]], members: Sequence[int], limit: int) -> list[int]:
        def bids(multiplier: float) -> list[int]:
            return [
                min(range(len(self.ladders[i])), key=lambda r: (table[i][r] + multiplier * self.prices[i][r], r))
                for i in members
            ]

        def fits(rungs: Sequence[int]) -> bool:
            return sum(self.prices[i][r] for i, r in zip(members, rungs, strict=True)) <= limit

        gains = (
            (table[i][r] - table[i][r + 1]) / self._step(i, r)
            for i in members
            for r in range(len(self.ladders[i]) - 1)
            if self._step(i, r) > 0
        )
        low, high = 0.0, 2 * max(filter(math.isfinite, gains), default=0.0)  # beyond the largest gain nobody buys
        if fits(best := bids(low)):
            return best
        best = bids(high) if fits(bids(high)) else [0] * len(members)
        for _ in range(50):
            middle = (low + high) / 2
            if fits(rungs := bids(middle)):
                high, best = middle, rungs
            else:
                low = middle
        return best

    # -- ladders ------------------------------------------------------------------------------------

    def joined(self, *others: Space) -> Space:
        """With the rungs of other spaces over the same sites; budget and stride stay its own."""
        all_ = zip(*(space.ladders for space in (self, *others)), strict=True)
        return replace(self, ladders=tuple(tuple(sorted(set().union(*ladders))) for ladders in all_))

    def zoomed(self, centre: Allocation, stride: float | None = None, reach: int = 4) -> Space:
        """Ladders of `reach` rungs on both sides of a centre; half the present stride where none is given.

        A stride is a share of a site's counts that are worth keeping, never less than one of them. Rungs beyond the
        ends are cut at the ends, so the smallest and the largest count stay reachable from near them.
        """
        stride = self.stride / 2 if stride is None else stride
        ladders = []
        for site, middle in zip(self.sites, centre, strict=True):
            counts = self.budget.counts(site)
            top, here = len(counts) - 1, bisect_left(counts, middle)
            step = max(1, round(stride * (top + site.least // site.step)))
            rungs = {counts[min(max(here + j * step, 0), top)] for j in range(-reach, reach + 1)}
            ladders.append(tuple(sorted(rungs)))
        return replace(self, ladders=tuple(ladders), stride=stride)
