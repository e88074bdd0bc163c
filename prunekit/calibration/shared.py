"""A calibration pass whose tokens are streamed by several workers, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.calibration.moments import ExpertMoments, Moments
from prunekit.data.tokens import TokenBatch
from prunekit.layer.statistics import Statistic
from prunekit.plugins.engine import Team, dealt
from prunekit.space.sites import Site


class SharedFlow:
    """A `BlockFlow` whose tokens are streamed by a team, whole windows each."""

    def __init__(self, team: Team, batch: TokenBatch, device: torch.device, *, dense: bool) -> None:
        """`device`: where moments are added up."""
        self.team, self.device = team, device
        self.shards = [batch.rows(rows) for rows in dealt(range(len(batch)), team.size)]
        team.supernet = None
        team.ask("stream", [(shard, dense) for shard in self.shards])

    def received(self, site: Site, statistics: Sequence[Statistic] = ()) -> Moments:
        """The moments of all shards."""
        first, *others = (moments.to(self.device) for moments in self._ask("received", site, statistics))
        for other in others:
            first = first.merged(other)
        return first

    def received_by_expert(self, site: Site, statistics: Sequence[Statistic] = ()) -> ExpertMoments:
        """The moments of all shards, of every expert."""
        first, *others = (moments.to(self.device) for moments in self._ask("received_by_expert", site, statistics))
        for other in others:
            first = first.merged(other)
        return first

    def carry(self, site: Site, weight: Float[Tensor, "d_out d_in"] | None) -> None:
        """From here on every stream passes `site` through this weight."""
        self._ask("carry", site, weight)

    def advance(self, block: int, weights: Mapping[Site, Tensor] | None = None) -> None:
        """Send every stream through a block."""
        self._ask("advance", block, weights)

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return self.team.ask(method, [args] * len(self.shards))
