"""Level space for samplers: real numbers in -1..1 become allocations with the exact budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from prunekit import Allocation, Space


@dataclass(frozen=True)
class Unknowns:
    """Deviations from a centre, in shares of the sites, decoded by the nearest allocation that spends the budget.

        kept_i = c_i + reach n_i Σ_j x_j d_ij                                                  (1)

    One unknown per site: d_ij = [i = j]. With `waves`, for sites i of kind k in block b of L,

        d_ij = [k = kind of j] cos(π w_j (b + ½)/L),   w_j = 0..waves                          (2)

    so that few unknowns bend a deep model smoothly; wave 0 trades one kind for another. Constraints never reach
    the sampler, and several x may mean one allocation.
    """

    space: Space
    centre: Allocation
    reach: float  # largest deviation, share of a site's groups
    waves: int | None = None  # None: one unknown per site

    @cached_property
    def directions(self) -> tuple[tuple[float, ...], ...]:
        """d_ij, one row per site."""
        sites = self.space.sites
        if self.waves is None:
            return tuple(tuple(float(i == j) for j in range(len(sites))) for i in range(len(sites)))
        depth = 1 + max(s.block for s in sites)
        columns = [(kind, w) for kind in sorted({s.kind for s in sites}) for w in range(self.waves + 1)]
        return tuple(
            tuple((s.kind == kind) * math.cos(math.pi * w * (s.block + 0.5) / depth) for kind, w in columns)  # (2)
            for s in sites
        )

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.directions[0])

    def decode(self, x: Sequence[float]) -> Allocation:
        """The allocation nearest to (1)."""
        return self.space.nearest(
            [
                c + self.reach * s.n_groups * sum(a * b for a, b in zip(x, d, strict=True))
                for c, s, d in zip(self.centre, self.space.sites, self.directions, strict=True)
            ]
        )
