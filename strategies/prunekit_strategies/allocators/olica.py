"""Olica's shares: queries and keys lose most, values little, and the MLPs the rest of what the budget asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prunekit import Allocator, Problem, Query, Search, Site, Space


@dataclass(frozen=True)
class Olica(Allocator):
    """Fixed shares for what is inside of heads, the same in every block; all other sites share what is left.

    With s the share that the budget removes from all sites, and T their prices by what is in them:

        values            s_v = 2 s / (1 + k)                                                           (1)
        queries, keys     s_q = 2 s where s ≤ 0.4, else k s_v                                           (2)
        all other sites   s_m = (s T - s_q T_q - s_v T_v) / T_m                                         (3)

    no share above what its sites can lose. Counts are rounded to meet the budget exactly. Without `heads: narrow` there
    are only other sites, and the shares are uniform.

    Source: Olica (He & Lin 2025, arXiv 2506.08436), the released code, k = 3. There s is of the whole model, embeddings
    counted, what linear maps beside MLPs add is not paid for, and a rounded share is near what was asked. With k = 3
    and s up to 0.4 attention loses 1.25 s there, beyond it s.
    """

    EASY: ClassVar[float] = 0.4  # of (2)

    k: float = 3.0

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"k is above 0, not {self.k}")

    def shares(self, sites: Sequence[Site], prices: Sequence[int], limit: int) -> list[float]:
        """The share of its counts that every site keeps, before anything is rounded.

        Args:
            sites: that may lose something.
            prices: of all of each.
            limit: what they may cost together.
        """
        total = sum(prices)
        s = min(max(1 - limit / max(total, 1), 0.0), 1.0)
        of_values = 2 * s / (1 + self.k)  # (1)
        fixed = {"values": of_values, "low-rank": 2 * s if s <= self.EASY else self.k * of_values}  # (2)
        kept, left = dict[int, float](), limit
        for i, site in enumerate(sites):
            if site.form.units in fixed:
                least = site.least / site.n_groups
                kept[i] = min(max(1 - fixed[site.form.units], least), 1.0)
                left -= round(kept[i] * prices[i])
        others = sum(price for i, price in enumerate(prices) if i not in kept)
        rest = left / others if others else 0.0  # 1 - s_m of (3)
        return [kept.get(i, min(max(rest, 0.0), 1.0)) for i in range(len(sites))]

    def first_space(self, whole: Space) -> Space:
        """One rung per site: there is nothing to choose."""
        target = [float(site.n_groups) for site in whole.sites]
        for members, limit in whole.open_partitions:
            prices = [whole.budget.price(whole.sites[i], whole.sites[i].n_groups) for i in members]
            shares = self.shares([whole.sites[i] for i in members], prices, limit)
            for i, share in zip(members, shares, strict=True):
                target[i] *= share
        return whole.zoomed(whole.nearest(target), stride=0.0, reach=0)

    def search(self, problem: Problem) -> Search:
        yield [Query(problem.start)]  # the answer is known; the question puts its loss into the ledger
        return problem.start
