"""Several workers for one run: each has the model, a shard of the calibration tokens, a share of every generation.

Moments add up, so shards are streamed side by side; allocations are judged one by one, so they can be
dealt out. What comes out is what one worker would find, but for the order of sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.moments import Moments
from prunekit.calibration.tokens import TokenBatch
from prunekit.checkpoint import Dense, opened
from prunekit.contracts import Objective
from prunekit.sites import Allocation, Site, Space
from prunekit.store import CandidateStore, Table
from prunekit.supernet import Supernet
from prunekit.teacher import Teacher


class Worker:
    """One share of the work, beside the model it is done with."""

    def __init__(self, dense: Dense) -> None:
        self.dense = dense
        self.teacher = Teacher(replace(dense.shares, teacher_disk=0))  # nobody clears up where a worker is lost
        self._flow: BlockFlow | None = None
        self._net: Supernet | None = None

    def stream(self, tokens: TokenBatch, dense: bool) -> None:
        """Begin a walk with these calibration tokens."""
        self._flow = BlockFlow(self.dense.model, self.dense.adapter, tokens, dense=dense)

    def received(self, site: Site, needs: frozenset[str]) -> Moments:
        """As `BlockFlow.received`, of its tokens."""
        assert self._flow is not None
        return self._flow.received(site, needs)

    def carry(self, site: Site, weight: Float[Tensor, "d_out d_in"] | None) -> None:
        """As `BlockFlow.carry`."""
        assert self._flow is not None
        self._flow.carry(site, weight)

    def advance(self, block: int) -> None:
        """As `BlockFlow.advance`."""
        assert self._flow is not None
        self._flow.advance(block)

    def meet(self, space: Space, errors: Table, store: CandidateStore) -> None:
        """The candidates that questions will be about; a walk is over."""
        self._flow = None
        dense = self.dense
        self._net = Supernet(dense.model, dense.adapter, space, errors, store, dense.shares, self.teacher)

    def judge(self, objective: Objective, allocations: Sequence[Allocation], batch: TokenBatch) -> list[float]:
        """The losses of some allocations."""
        assert self._net is not None
        return [loss for _, loss in self._net.judged(objective, allocations, batch)]


class Team(ABC):
    """Workers by number. Who has been asked something waits for nobody else."""

    size: int
    knows: Supernet | None = None  # what all were told to `meet`

    @abstractmethod
    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the first len(each) workers answer, each asked a `Worker` method with its own arguments."""


@dataclass(frozen=True)
class Opening:
    """How a worker elsewhere opens the model."""

    source: str | PreTrainedModel
    dtype: str = "auto"
    trust_remote_code: bool = False

    def open(self, device: str) -> Dense:
        """The dense model on a device; nobody asks a worker for text."""
        return opened(self.source, (), device=device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)


class SharedFlow:
    """A `BlockFlow` whose tokens are streamed by a team, whole windows each."""

    def __init__(self, team: Team, batch: TokenBatch, device: torch.device, *, dense: bool) -> None:
        """`device`: where moments are added up."""
        self.team, self.device = team, device
        self.shards = shards(batch, team.size)
        team.knows = None
        team.ask("stream", [(shard, dense) for shard in self.shards])

    def received(self, site: Site, needs: frozenset[str] = frozenset()) -> Moments:
        """The moments of all shards."""
        first, *others = (moments.to(self.device) for moments in self._ask("received", site, needs))
        for other in others:
            first = first.merged(other)
        return first

    def carry(self, site: Site, weight: Float[Tensor, "d_out d_in"] | None) -> None:
        """From here on every stream passes `site` through this weight."""
        self._ask("carry", site, weight)

    def advance(self, block: int) -> None:
        """Send every stream through a block."""
        self._ask("advance", block)

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return self.team.ask(method, [args] * len(self.shards))


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
        if self.team.knows is not self:
            self.team.ask("meet", [(self.space, self.errors, self.store)] * self.team.size)
            self.team.knows = self
        shares = dealt(sorted(set(allocations)), self.team.size)
        losses = self.team.ask("judge", [(objective, share, batch) for share in shares])
        found = dict(zip((a for share in shares for a in share), (x for part in losses for x in part), strict=True))
        yield from ((allocation, found[allocation]) for allocation in dict.fromkeys(allocations))


def shards(batch: TokenBatch, count: int) -> list[TokenBatch]:
    """The windows of a batch in at most `count` runs of nearly equal length, none empty."""
    return [
        replace(batch, ids=ids, origins=tuple(batch.origins[i] for i in rows) if batch.origins else ())
        for rows in dealt(range(len(batch.ids)), count)
        for ids in [batch.ids[rows[0] : rows[-1] + 1]]
    ]


def dealt(items: Sequence[Any], count: int) -> list[list[Any]]:
    """Items in order, in at most `count` pieces whose lengths differ by one at most; none is empty."""
    count = min(count, len(items))
    ends = [len(items) * i // count for i in range(count + 1)]
    return [list(items[a:b]) for a, b in pairwise(ends)]
