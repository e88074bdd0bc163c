"""A supernet whose questions are answered by several workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prunekit.data.tokens import TokenBatch
from prunekit.plugins.engine import Team, dealt
from prunekit.plugins.objective import Objective
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation


class SharedSupernet(Supernet):
    """A `Supernet` that lets a team judge; what is one question is no work for several."""

    def __init__(self, net: Supernet, team: Team) -> None:
        super().__init__(net.model, net.adapter, net.space, net.errors, net.store, net.shares, net.teacher)
        self.team = team

    def judged(
        self, objective: Objective, allocations: Sequence[Allocation], batch: TokenBatch
    ) -> Iterator[tuple[Allocation, float]]:
        """As `Supernet.judged`: neighbours, which begin alike, go to the same worker."""
        if len(allocations) < 2:
            yield from super().judged(objective, allocations, batch)
            return
        if self.team.supernet is not self:
            self.team.ask("open_supernet", [(self.space, self.errors, self.store)] * self.team.size)
            self.team.supernet = self
        shares = dealt(sorted(set(allocations)), self.team.size)
        losses = self.team.ask("judge", [(objective, share, batch) for share in shares])
        found = dict(zip((a for share in shares for a in share), (x for part in losses for x in part), strict=True))
        yield from ((allocation, found[allocation]) for allocation in dict.fromkeys(allocations))
