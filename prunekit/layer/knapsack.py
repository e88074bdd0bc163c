"""Which groups of all sites to keep under one exact budget, and the nearest point that costs as much.

A vector over groups has one number for every group of every site, site by site, in float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation

MONEY = 1 << 16  # steps of price that dynamic programming tells apart at most; finer prices are rounded up
HALVINGS = 64  # of an interval: more than float64 can tell apart


@dataclass(frozen=True, eq=False)
class Knapsack:
    """The budget arithmetic of vectors over all groups of a space whose ladders are whole."""

    space: Space

    # -- shapes and prices --------------------------------------------------------------------------

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """What a group of every site counts for: 1, and of a pattern the weights of a row between two counts."""
        return tuple(1 if site.form.shrinks else site.step for site in self.space.sites)

    @cached_property
    def sizes(self) -> list[int]:
        """Groups of every site."""
        return [site.n_groups // step for site, step in zip(self.space.sites, self.steps, strict=True)]

    @cached_property
    def ladders(self) -> tuple[tuple[int, ...], ...]:
        """The ladders of the space, in groups."""
        return tuple(
            tuple(k // step for k in ladder) for ladder, step in zip(self.space.ladders, self.steps, strict=True)
        )

    @cached_property
    def site(self) -> Int64[Tensor, " groups"]:
        """Number of the site of every group."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    @cached_property
    def price(self) -> Float[Tensor, " groups"]:
        """What a group costs beside others of its site; where prices are no line, its part of the whole site's; 0 where
        nothing of a site may go."""
        return torch.tensor([each for each, _, _ in self._lines], dtype=torch.float64)[self.site]

    @cached_property
    def _lines(self) -> list[tuple[float, int, bool]]:
        """(price of a group, what the first costs more, whether all prices of the site are on that line)."""
        lines: list[tuple[float, int, bool]] = []
        for n, ladder, prices in zip(self.sizes, self.ladders, self.space.prices, strict=True):
            known = dict(zip(ladder, prices, strict=True))
            if ladder == (n,):
                lines.append((0, known[n], False))
                continue
            each = known[n] - known[n - 1] if n > 1 and n - 1 in known else known[n] - known.get(0, 0)
            first = known[n] - n * each
            on_line = len(ladder) == n + 1 and all(p == (first + k * each if k else 0) for k, p in known.items())
            lines.append((each, first, True) if on_line and first >= 0 else (known[n] / n, 0, False))
        return lines

    @cached_property
    def fixed(self) -> Bool[Tensor, " groups"]:
        """Which groups stay whatever is decided, because nothing of their site may go."""
        whole = [ladder == (n,) for n, ladder in zip(self.sizes, self.ladders, strict=True)]
        return torch.tensor(whole, dtype=torch.bool)[self.site]

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector over groups, site by site."""
        return list(vector.split(self.sizes))

    def counts(self, keep: Bool[Tensor, " groups"]) -> Allocation:
        """How many groups of every site are kept."""
        return tuple(int(part.sum()) for part in self.split(keep))

    @cached_property
    def full(self) -> list[int]:
        """What all sites of every budget partition cost when all is kept."""
        return [sum(self.space.prices[i][-1] for i in members) for members, _ in self.space.partitions]

    # -- the best set -------------------------------------------------------------------------------

    def project(
        self,
        value: Float[Tensor, " groups"],
        *,
        among: Bool[Tensor, " groups"] | None = None,
        progress: float = 1.0,
    ) -> Bool[Tensor, " groups"]:
        """The set of groups of largest total value within the budget.

        With one price it is a sort; with two, for every number of the dear ones the best of the cheap ones that are
        still paid for (exact: within a price the best come first); else dynamic programming over sites, where a count
        stands for the best so many groups, in at most `MONEY` steps of price. The first group of a site may cost more
        than the next, a norm and biases: a site of which nothing is kept is closed, what it frees is spent on the
        others, and that again. No group that would still fit is left out. On a tie the lower id stays.

        Args:
            value: of keeping every group, 0 or more. Of learners whose parameters are compared with one threshold, the
                parameter times the price: only the boundary is then decided by the knapsack.
            among: groups that may be kept; None: all.
            progress: how far the limit has come from the price of the dense sites, at 0, to the budget, at 1.

        Returns:
            Which groups stay.

        Raises:
            ValueError: values have another length, are below 0 or not finite.
        """
        value = value.detach().double().cpu()
        if value.shape != self.site.shape or not bool(torch.isfinite(value).all()) or bool((value < 0).any()):
            raise ValueError(f"{len(self.site)} finite values from 0 up are needed, one for every group")
        allowed = torch.ones_like(self.site, dtype=torch.bool) if among is None else among.cpu()
        keep = torch.zeros_like(allowed)
        for (members, limit), full in zip(self.space.partitions, self.full, strict=True):
            here = full - math.ceil(progress * (full - limit)) if progress < 1 else limit
            if all(self._lines[i][2] for i in members):
                self._opened(value, allowed, members, here, keep)
            else:
                self._programmed(value, allowed, members, here, keep)
            self._filled(value, allowed, members, here, keep)
        return keep

    def euclid(
        self, point: Float[Tensor, " groups"], weight: Float[Tensor, " groups"] | None = None
    ) -> Float[Tensor, " groups"]:
        """The nearest point in [0, 1] that costs the budget: clip(p - ν price / weight, 0, 1), ν of either sign.

        What the first group of a site costs more is taken as spent, and all of a site of which nothing may go. A
        partition that can be kept whole is.

        Args:
            point: p.
            weight: of the squared distance of every group, above 0; None: 1, as a step down a slope wants it, whose end
                then is where slopes are in the ratio of prices. With the prices for weights all groups are shifted
                alike, as a point to begin at wants it: without, one that costs a hundred times as much is shifted a
                hundred times as far.
        """
        found = point.detach().double().cpu().clone()
        rate = self.price if weight is None else torch.where(self.price > 0, self.price / weight, 0.0)
        for members, limit in self.space.partitions:
            mine = torch.isin(self.site, torch.tensor(members))
            p, c, shift = found[mine], self.price[mine], rate[mine]
            total = limit - sum(self._lines[i][1] for i in members)
            if float(c.sum()) <= total:
                found[mine] = 1.0
                continue
            reach = (1 + float(p.abs().max())) / float(shift[c > 0].min())
            low, high = -reach, reach
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if float(c @ (p - middle * shift).clamp(0, 1)) > total else (low, middle)
            found[mine] = torch.where(c > 0, (p - high * shift).clamp(0, 1), 1.0)
        return found

    # -- inside -------------------------------------------------------------------------------------

    def _opened(self, value: Tensor, allowed: Tensor, members: Sequence[int], limit: int, keep: Tensor) -> None:
        """The best set where every site has one price and a first one, in place."""
        opened = set(members)
        worth = torch.zeros(len(self.sizes), dtype=torch.float64).index_add_(0, self.site, value * allowed)
        while True:
            while (money := limit - sum(self._lines[i][1] for i in opened)) < 0:
                opened.remove(min(opened, key=lambda i: (float(worth[i]), -i)))  # the last of those worth least
            free = allowed & torch.isin(self.site, torch.tensor(sorted(opened)))
            chosen = self._best(value, free, money)
            there = set(self.site[chosen].unique().tolist())
            if there == opened or not (empty := {i for i in opened - there if self._lines[i][1]}):
                keep |= chosen
                return
            opened -= empty

    def _best(self, value: Tensor, free: Tensor, money: int) -> Tensor:
        """The best of the `free` groups for so much money, the price of a group being its own alone."""
        chosen = free & (self.price == 0)
        kinds = self.price[free & (self.price > 0)].unique().long().tolist()
        if len(kinds) > 2:
            return chosen | self._programmed_groups(value, free & (self.price > 0), money)
        orders = [_ranked(value, free & (self.price == kind)) for kind in kinds]
        if len(kinds) == 1:
            chosen[orders[0][: money // kinds[0]]] = True
        elif kinds:
            cheap, dear = orders
            most = min(len(dear), money // kinds[1])
            left = money - kinds[1] * torch.arange(most + 1)
            counts = (left // kinds[0]).clamp_max(len(cheap))
            sums = _sums(value[dear])[: most + 1] + _sums(value[cheap])[counts]
            a = int(sums.argmax())
            chosen[dear[:a]] = True
            chosen[cheap[: int(counts[a])]] = True
        return chosen

    def _programmed_groups(self, value: Tensor, free: Tensor, money: int) -> Tensor:
        """As `_best`, with three prices or more."""
        rows = []
        for i in self.site[free].unique().tolist():
            counts = list(range(int(free[self.site == i].sum()) + 1))
            rows.append((i, counts, [int(self._lines[i][0]) * count for count in counts]))
        return self._dynamic(value, free, rows, money)

    def _programmed(self, value: Tensor, allowed: Tensor, members: Sequence[int], limit: int, keep: Tensor) -> None:
        """The best set where prices are those of a table, in place."""
        rows = []
        for i in members:
            most = int(allowed[self.site == i].sum())
            pairs = [(k, p) for k, p in zip(self.ladders[i], self.space.prices[i], strict=True) if k <= most]
            rows.append((i, [k for k, _ in pairs], [p for _, p in pairs]))
        keep |= self._dynamic(value, allowed, rows, limit)

    def _dynamic(
        self, value: Tensor, free: Tensor, rows: Sequence[tuple[int, list[int], list[int]]], limit: int
    ) -> Tensor:
        """f_i[c] = max_k f_{i-1}[c - price_i(k)] + V_i(k), V_i(k) the sum of the k largest values of site i.

        `rows`: (site, counts, their prices, ascending), from the least that can be kept on.
        """
        least = sum(prices[0] for _, _, prices in rows)
        extra = [[p - prices[0] for p in prices] for _, _, prices in rows]
        unit = math.gcd(*(p for each in extra for p in each)) or 1
        unit *= max(1, math.ceil((limit - least) / unit / MONEY))
        money = max(0, min((limit - least) // unit, sum(-(-each[-1] // unit) for each in extra)))
        f, orders, picks = torch.zeros(money + 1, dtype=torch.float64), [], []
        for (i, counts, _), each in zip(rows, extra, strict=True):
            order = _ranked(value, free & (self.site == i))
            gains, best = _sums(value[order]), torch.full_like(f, -torch.inf)
            pick = torch.zeros(money + 1, dtype=torch.long)
            for r, (count, p) in enumerate(zip(counts, each, strict=True)):
                if (cost := -(-p // unit)) > money:
                    break
                option = f[: money + 1 - cost] + gains[count]
                better = option > best[cost:]
                best[cost:] = torch.where(better, option, best[cost:])
                pick[cost:] = torch.where(better, r, pick[cost:])
            f = best
            orders.append(order)
            picks.append(pick)
        chosen = torch.zeros_like(free)
        for (_, counts, _), each, order, pick in reversed(list(zip(rows, extra, orders, picks, strict=True))):
            r = int(pick[money])
            chosen[order[: counts[r]]] = True
            money -= -(-each[r] // unit)
        return chosen

    def _filled(self, value: Tensor, allowed: Tensor, members: Sequence[int], limit: int, keep: Tensor) -> None:
        """Raise sites by what still fits, the groups of most value for their price first, in place."""
        counts, most = self.counts(keep), self.counts(allowed)
        rungs = {i: self.ladders[i].index(counts[i]) for i in members}
        spare = limit - sum(self.space.prices[i][rungs[i]] for i in members)
        while True:
            offers = []
            for i in members:
                ladder, prices, r = self.ladders[i], self.space.prices[i], rungs[i]
                if r + 1 < len(ladder) and ladder[r + 1] <= most[i] and (rise := prices[r + 1] - prices[r]) <= spare:
                    order = _ranked(value, allowed & ~keep & (self.site == i))[: ladder[r + 1] - ladder[r]]
                    offers.append((-float(value[order].sum()) / max(rise, 1), i, rise, order))
            if not offers:
                return
            _, i, rise, order = min(offers, key=lambda offer: offer[:2])
            keep[order] = True
            rungs[i] += 1
            spare -= rise


def _ranked(value: Tensor, free: Tensor) -> Int64[Tensor, " some"]:
    """The free groups from the largest value on; on a tie the lower id comes first."""
    ids = free.nonzero().flatten()
    return ids[value[ids].argsort(descending=True, stable=True)]


def _sums(values: Tensor) -> Tensor:
    """Of the first 0, 1, … values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
