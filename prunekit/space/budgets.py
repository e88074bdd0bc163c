"""Budgets: at most so many units of one metric, met exactly."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from prunekit.errors import WrongInput
from prunekit.space.prices import Curve, Prices
from prunekit.space.sites import Kind, Site

Metric = Literal["parameters", "bytes", "flops", "kv-cache", "latency"]


@dataclass(frozen=True)
class Budget:
    """At most `limit` units of one metric over all sites, or over the sites of each kind apart.

    Prices follow from a site's numbers; those of latency, in nanoseconds, are in a table that was measured.
    """

    limit: int
    metric: Metric = "parameters"
    bytes_per_parameter: int = 2
    by_kind: tuple[tuple[Kind, int], ...] = ()  # (kind, limit): kinds do not trade; the limits sum to `limit`
    table: Prices | None = None  # of metric latency

    def counts(self, site: Site) -> Sequence[int]:
        """The counts worth keeping, ascending: every one, or those of the table; others are raised to the next."""
        if self.metric == "latency":
            return [k for k in self._curve(site).counts if k >= site.least]
        return range(site.least, site.n_groups + 1, site.step)

    def price(self, site: Site, kept: int) -> int:
        """What `kept` groups of `site` cost."""
        if self.metric == "latency":
            return self._curve(site).price(kept)
        if self.metric == "kv-cache":
            return kept * site.cached_per_group
        unit = {"parameters": 1, "bytes": self.bytes_per_parameter, "flops": 2}[self.metric]
        return unit * site.parameters(kept)

    @classmethod
    def keeping(
        cls,
        share: float | Fraction,
        sites: Sequence[Site],
        *,
        metric: Metric = "parameters",
        bytes_per_parameter: int = 2,
        outside: int = 0,
        apart: bool = False,
        table: Prices | None = None,
    ) -> Budget:
        """The budget that keeps `share` of the sites and of `outside` parameters no site can free.

        Of latency it keeps `share` of the dense model's; with `apart`, every kind the same share of its own.

        Raises:
            WrongInput: the share cannot be reached; says which can. The table is of another model.
        """
        ruler, exact = cls(0, metric, bytes_per_parameter, table=table), Fraction(str(share))
        if table is not None:
            fixed = ruler._outside(sites)
        else:
            fixed = outside * ruler.price(Site("", 0, "mlp", 1, 1, 1), 1) if metric != "kv-cache" else 0

        def limit(some: Sequence[Site], exact: Fraction, fixed: int) -> int:
            full = sum(ruler.price(s, s.n_groups) for s in some) + fixed
            least = sum(ruler.price(s, s.least) for s in some) + fixed
            if full == 0:
                raise WrongInput(f"no site has a price in {metric}; choose another metric")
            if full * exact < least and metric == "latency":
                lowest = math.ceil(10_000 * least / full) / 10_000
                raise WrongInput(
                    f"latency={float(exact):.4g} cannot be met: reachable is {lowest} to 1, because "
                    f"{least / 1e6:.4g} of {full / 1e6:.4g} ms are spent where nothing can be removed"
                )
            if full * exact < least:
                raise WrongInput(
                    f"sparsity {float(1 - exact):.4g} of {metric} cannot be met: "
                    f"reachable is 0 to {1 - least / full:.4g}, because {least:,} of {full:,} always stay"
                )
            return math.floor(full * exact) - fixed

        def budget(limit: int, by_kind: tuple[tuple[Kind, int], ...] = ()) -> Budget:
            return replace(ruler, limit=limit, by_kind=by_kind)

        if not apart:
            return budget(limit(sites, exact, fixed))
        if table is not None:  # what the sites may take of what they take
            exact = Fraction(limit(sites, exact, fixed), max(1, table.dense - fixed))
        kinds: list[Kind] = sorted({s.kind for s in sites})
        limits: tuple[tuple[Kind, int], ...] = tuple(
            (k, limit([s for s in sites if s.kind == k], exact, 0)) for k in kinds
        )
        return budget(sum(n for _, n in limits), limits)

    def _curve(self, site: Site) -> Curve:
        if self.table is None:
            raise WrongInput("latency has no prices but those of a table; measure one first: prunekit prune --target")
        curve = self.table.curves.get(site.shape)
        if curve is None or curve.counts[-1] != site.n_groups:
            raise WrongInput(
                f"the price table has no {site.shape}, as {site.name} is; it is of another model: measure anew with "
                "--set latency.prices=null"
            )
        return curve

    def _outside(self, sites: Sequence[Site]) -> int:
        """Of the table, which must be of as many sites of every shape."""
        assert self.table is not None
        if Counter(site.shape for site in sites) != {shape: curve.sites for shape, curve in self.table.curves.items()}:
            for site in sites:
                self._curve(site)
            raise WrongInput(
                "the price table is of a model with another number of sub-layers; measure anew with "
                "--set latency.prices=null"
            )
        return self.table.outside
