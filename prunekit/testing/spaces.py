"""Small allocation problems with known answers: additive tables over uneven prices, kinds and ends."""

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from prunekit.plugins.allocator import Problem
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.space.metrics import Metric
from prunekit.space.prices import Curve, Prices, Workload
from prunekit.space.sites import Allocation, Kind, Site

Table = tuple[tuple[float, ...], ...]


def sites_of(blocks: int, attention: tuple[int, int], mlp: tuple[int, int]) -> tuple[Site, ...]:
    """Attention and MLP sites in turn, each kind given as (groups, parameters per group)."""

    def site(block: int, kind: Kind, groups: int, price: int) -> Site:
        return Site(f"{block}.{kind}", block, kind, groups, 1, price, cached_per_group=kind == "attention")

    return tuple(s for b in range(blocks) for s in (site(b, "attention", *attention), site(b, "mlp", *mlp)))


def small_llama(share: float = 0.5) -> Space:
    """Every count of 16 sites: 8 blocks of 4 KV groups and 768 neurons, one group as dear as 64 neurons."""
    sites = sites_of(8, attention=(4, 49_152), mlp=(768, 768))
    return Space.whole(sites, Budget.keeping(share, sites))


@dataclass(frozen=True)
class Tiles(Metric):
    """Time in steps of a tile, as hardware has it: 30 for any, 10 a group of attention, 20 for each further tile.

    80 are spent outside of the sub-layers.
    """

    unit: ClassVar[str] = "tiles"

    tile: int = 4

    def counts(self, site: Site) -> Sequence[int]:
        step = 1 if site.kind == "attention" else self.tile
        return (0, *range(step, site.n_groups, step), site.n_groups)

    def price(self, site: Site, kept: int) -> int:
        rise = 10 if site.kind == "attention" else 20
        return 30 + rise * (bisect_left(self.counts(site), kept) - 1) if kept else 0

    def outside(self, sites: Sequence[Site], parameters: int) -> int:
        return 80


@dataclass(frozen=True)
class Cached(Metric):
    """Values in the cache of attention: most sites have no price."""

    unit: ClassVar[str] = "cached values"

    def price(self, site: Site, kept: int) -> int:
        return kept * site.cached_per_group

    def outside(self, sites: Sequence[Site], parameters: int) -> int:
        return 0


def timed(sites: Sequence[Site]) -> Prices:
    """The price table of a model on hardware that works in `Tiles`."""
    metric, curves = Tiles(), dict[str, Curve]()
    for site in sites:
        counts, many = tuple(metric.counts(site)), sum(other.shape == site.shape for other in sites)
        curves[site.shape] = Curve(counts, tuple(metric.price(site, kept) for kept in counts), many)
    dense = metric.outside(sites, 0) + sum(metric.price(site, site.n_groups) for site in sites)
    return Prices(Workload(1, 8, 0), {}, dense, 0.0, curves)


def convex_table(space: Space, seed: int = 0) -> Table:
    """Relative errors w (1 - share)^p: 0 when all is kept, convex, unlike in size and shape from site to site."""
    rng = random.Random(seed)
    shapes = [(rng.uniform(0.2, 1.0), rng.uniform(1.2, 3.0)) for _ in space.sites]
    return tuple(
        tuple(w * (1 - k / site.n_groups) ** p for k in ladder)
        for (w, p), site, ladder in zip(shapes, space.sites, space.ladders, strict=True)
    )


def rough_table(space: Space, seed: int = 0) -> Table:
    """Falling errors without any shape."""
    rng = random.Random(seed)
    return tuple(tuple(sorted((rng.random() for _ in ladder), reverse=True)) for ladder in space.ladders)


def additive(table: Sequence[Sequence[float]], space: Space) -> Callable[[Allocation], float]:
    """The objective Σ_i table[i][r_i]; 0 for a probe's dense sub-layer."""
    return lambda allocation: sum(
        row[ladder.index(kept)] if kept in ladder else 0.0
        for row, ladder, kept in zip(table, space.ladders, allocation, strict=True)
    )


def problem(space: Space, errors: Table | None = None, seed: int = 0, tokens: int = 65_536) -> Problem:
    """A problem that starts from uniform; convex errors unless told."""
    return Problem(space, errors or convex_table(space, seed), space.uniform(), seed, tokens)


def _of(blocks: int, share: float, **budget: Any) -> Problem:
    """Attention of 4 groups and MLPs of 16, every count of both."""
    sites = sites_of(blocks, attention=(4, 10), mlp=(16, 3))
    return problem(Space.whole(sites, Budget.keeping(share, sites, **budget)))


def _even() -> Problem:
    space = Space.whole(tuple(Site(str(i), i, "mlp", 4, 1, 1) for i in range(4)), Budget(8))
    return problem(space, rough_table(space, 1))


def _uneven() -> Problem:
    """Three attention groups cost as much as two steps of an MLP ladder, so no single swap of rungs is exact."""
    sites = sites_of(3, attention=(4, 64), mlp=(768, 1))
    return problem(Space.whole(sites, Budget.keeping(0.6, sites)).zoomed((2, 384) * 3, stride=1 / 8, reach=8))


def _spared() -> Problem:
    """Blocks at both ends stay whole."""
    sites = sites_of(4, attention=(4, 10), mlp=(16, 3))
    sites = tuple(replace(site, spared=site.block in (0, 3)) for site in sites)
    return problem(Space.whole(sites, Budget.keeping(0.7, sites)))


def _one_site() -> Problem:
    sites = (Site("only", 0, "mlp", 16, 1, 3),)
    return problem(Space.whole(sites, Budget.keeping(0.5, sites)))


ZOO: Mapping[str, Callable[[], Problem]] = {
    "even": _even,
    "uneven": _uneven,
    "apart": partial(_of, 3, 0.5, apart=True),
    "cached": partial(_of, 3, 0.5, metric=Cached()),  # only attention has a price
    # prices from a table: most counts are not worth keeping, and the first group is dearer than the next
    "timed": partial(_of, 3, 0.6, metric=Tiles()),
    "nearly all": partial(_of, 2, 0.95),
    "nearly none": partial(_of, 2, 0.05),
    "one site": _one_site,
    "spared": _spared,
    "one rung": lambda: problem(replace(_even().space, ladders=((2,),) * 4)),  # nothing to swap
    "no tokens": lambda: replace(_uneven(), tokens=0),
}
"""Problems every allocator meets, by what is hard about them."""
