"""Search on coarse ladders first, then on finer ones around the answer: Týr-the-Pruner's outer loop."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from prunekit import Allocation, Allocator, Problem, Search, Space
from prunekit_strategies.allocators.evolution import Evolution


@dataclass(frozen=True)
class CoarseToFine(Allocator):
    """Search with `inner`; then re-centre the ladders on its answer, halve their stride, prune and search again.

        rungs of site i:   c_i + j q n_i,   |j| ≤ reach        (1)
        next round:        c ← answer,   q ← q / 2             (2)

    with n_i groups and the centre c. The first round reaches over the whole ladder, and every round is pruned
    anew from the dense model, so its moments and errors are those along the present centre.

    Source: Li et al., Týr-the-Pruner, arXiv:2503.09657, section 3.3: q = 12.5, 6.25, 3.125, 1.5625 %, reach 4.
    We differ: attention and MLP sites trade under one exact budget unless the budget keeps them apart.
    """

    inner: Allocator = field(default_factory=Evolution)
    stride: float = 1 / 8  # q of the first round, share of a site's groups
    last_stride: float = 1 / 64  # q of the last round
    reach: int = 4  # rungs on either side of the centre, from the second round on

    def __post_init__(self) -> None:
        if not 0 < self.last_stride <= self.stride <= 1:
            raise ValueError(f"0 < last_stride ≤ stride ≤ 1, not {self.last_stride} and {self.stride}")
        if self.reach < 1:
            raise ValueError(f"reach is at least one rung, not {self.reach}")

    def ready(self) -> None:
        self.inner.ready()

    @property
    def signals(self) -> tuple[Any, ...]:
        return self.inner.signals

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs

    @property
    def asks(self) -> bool:
        return self.inner.asks

    def first_space(self, whole: Space) -> Space:
        # as many rungs as it takes from one end of a ladder to the other
        return whole.zoomed(whole.uniform(), stride=self.stride, reach=-int(-1 // Fraction(self.stride)))

    def search(self, problem: Problem) -> Search:
        return (yield from self.inner.search(problem))

    def next_space(self, space: Space, best: Allocation) -> Space | None:
        if space.stride / 2 < self.last_stride:
            return None
        return space.zoomed(best, reach=self.reach)  # (1), (2)
