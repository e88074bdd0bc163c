"""What allocators share that remove whole sub-layers: their ladders, what the budget still wants, what is built."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from prunekit import Allocation, Space


def all_or_none(whole: Space) -> Space:
    """Two rungs per site, the least it can keep and all; one for sites of which nothing may go."""
    ladders = tuple(tuple(sorted({ladder[0], ladder[-1]})) for ladder in whole.ladders)
    return replace(whole, ladders=ladders, stride=1.0)


def emptied(space: Space, here: Allocation, sites: Sequence[int]) -> Allocation:
    """The allocation with some sites at their lowest rungs."""
    gone = {i: space.ladders[i][0] for i in sites}
    return tuple(gone.get(i, kept) for i, kept in enumerate(here))


def excess(space: Space, here: Allocation) -> dict[int, int]:
    """By how much an allocation exceeds each partition of the budget, by position; those that it keeps are left out."""
    spent = {
        p: sum(space.budget.price(space.sites[i], here[i]) for i in members) - limit
        for p, (members, limit) in enumerate(space.partitions)
    }
    return {p: over for p, over in spent.items() if over > 0}


def saved(space: Space, here: Allocation, there: Allocation, partitions: Mapping[int, int]) -> int:
    """What is saved between two allocations in some partitions, none more than it exceeds its limit."""
    total = 0
    for p, over in partitions.items():
        members, _ = space.partitions[p]
        freed = sum(
            space.budget.price(space.sites[i], here[i]) - space.budget.price(space.sites[i], there[i]) for i in members
        )
        total += min(freed, over)
    return total


def settled(whole: Space, best: Allocation) -> Allocation:
    """The allocation to build: what is removed stays removed, and what the budget leaves is spent on the others.

    Where the others are whole, a removed site comes back as far as it can: that which takes most of what is left, the
    later one on a tie, and so on.
    """
    gone = [i for i, kept in enumerate(best) if kept == whole.ladders[i][0] < whole.ladders[i][-1]]
    kept_down = tuple((ladder[0],) if i in gone else ladder for i, ladder in enumerate(whole.ladders))
    plan = list(replace(whole, ladders=kept_down).nearest(best))

    def spare(i: int) -> int:
        members, limit = next(partition for partition in whole.partitions if i in partition[0])
        return limit - sum(whole.budget.price(whole.sites[j], plan[j]) for j in members)

    while gone:
        taken = []
        for i in gone:
            prices, room = whole.prices[i], spare(i)
            rung = max(r for r, price in enumerate(prices) if price - prices[0] <= room)
            taken.append((prices[rung] - prices[0], i, rung))
        price, i, rung = max(taken)
        if not price:
            break
        plan[i] = whole.ladders[i][rung]
        gone.remove(i)
    return tuple(plan)
