"""Budgets: at most so many units of one metric, met exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from prunekit.errors import PluginError, WrongInput
from prunekit.space.metrics import PARAMETERS, Metric
from prunekit.space.sites import Kind, Site


@dataclass(frozen=True)
class Budget:
    """At most `limit` units of one metric over all sites, or over the sites of each kind apart."""

    limit: int
    metric: Metric = PARAMETERS
    by_kind: tuple[tuple[Kind, int], ...] = ()  # (kind, limit): kinds do not trade; the limits sum to `limit`
    outside: int = 0  # units that no site can free, beside the limit
    dense: int = 0  # units of the dense model, those outside included

    def counts(self, site: Site) -> Sequence[int]:
        """The counts worth keeping, ascending; a count in between has the price of the next one."""
        counts = self.metric.counts(site)
        if site.multiple == 1:
            return counts
        return [kept for kept in counts if kept % site.multiple == 0 or kept == site.n_groups]

    def price(self, site: Site, kept: int) -> int:
        """What `kept` groups of `site` cost."""
        return _price(self.metric, site, kept)

    @classmethod
    def keeping(
        cls,
        share: float | Fraction,
        sites: Sequence[Site],
        *,
        metric: Metric = PARAMETERS,
        outside: int = 0,
        apart: bool = False,
    ) -> Budget:
        """The budget that keeps `share` of what the sites and `outside` parameters, which no site can free, cost.

        With `apart`, every kind keeps the same share of its own, and all of it where all its sites are spared; what is
        outside then counts only where it is no matter of parameters.

        Raises:
            WrongInput: the share cannot be reached; says which can. The metric has no prices for these sites.
        """
        exact = Fraction(str(share))

        def full(some: Sequence[Site]) -> int:
            return sum(_price(metric, site, site.n_groups) for site in some)

        def limit(some: Sequence[Site], exact: Fraction, fixed: int) -> int:
            whole, least = full(some) + fixed, sum(_price(metric, site, site.least) for site in some) + fixed
            if whole == 0:
                raise WrongInput(f"no site has a price in {metric.unit}; choose another metric")
            if whole * exact < least:
                raise WrongInput(metric.unreachable(exact, least, whole))
            return math.floor(whole * exact) - fixed

        beside = metric.outside(sites, outside)
        dense = full(sites) + beside
        if not apart:
            return cls(limit(sites, exact, beside), metric, (), beside, dense)
        if fixed := metric.outside(sites, 0):  # what the sites may take of what they take
            exact = Fraction(limit(sites, exact, fixed), max(1, full(sites)))
        kinds: list[Kind] = sorted({site.kind for site in sites})

        def of_kind(kind: Kind) -> int:
            some = [site for site in sites if site.kind == kind]
            return full(some) if all(site.spared for site in some) else limit(some, exact, 0)

        limits: tuple[tuple[Kind, int], ...] = tuple((kind, of_kind(kind)) for kind in kinds)
        return cls(sum(n for _, n in limits), metric, limits, beside, dense)

    def setting_aside(self, units: int, sites: Sequence[Site], kind: Kind) -> Budget:
        """The budget when so many of its units go to what is added beside the sites of a kind.

        Raises:
            WrongInput: what is left is less than the sites' smallest counts cost.
        """
        by_kind = tuple((each, limit - units * (each == kind)) for each, limit in self.by_kind)
        parts = by_kind or ((None, self.limit - units),)
        for part, limit in parts:
            least = sum(self.price(site, site.least) for site in sites if part in (None, site.kind))
            if least > limit:
                raise WrongInput(
                    f"a recovery step adds {units:,} {self.metric.unit}, which leaves {limit:,} of the budget, and "
                    f"{least:,} always stay; ask for a lower sparsity, or let it add less"
                )
        return replace(self, limit=self.limit - units, by_kind=by_kind, outside=self.outside + units)


def _price(metric: Metric, site: Site, kept: int) -> int:
    """What `kept` groups of a site cost.

    Raises:
        PluginError: the metric says something else than a whole number.
    """
    price = metric.price(site, kept)
    if not isinstance(price, int):
        raise PluginError(f"{type(metric).__name__}: the price of {kept} of {site.name} is {price!r}, no whole number")
    return price
