"""Several workers for one run: each has the model, a shard of the calibration tokens, a share of every generation.

Moments add up, so shards are streamed side by side; allocations are judged one by one, so they can be
dealt out. What comes out is what one worker would find, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.moments import ExpertMoments, Moments
from prunekit.data.tokens import TokenBatch
from prunekit.layer.statistics import Statistic
from prunekit.models.opening import opened
from prunekit.plugins.dense import Dense
from prunekit.plugins.engine import Opening
from prunekit.plugins.objective import Objective
from prunekit.search.store import CandidateStore, Table
from prunekit.search.supernet import Supernet
from prunekit.search.teacher import Teacher
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation, Site


class Worker:
    """One share of the work, beside the model it is done with."""

    def __init__(self, dense: Dense) -> None:
        self.dense = dense
        self.teacher = Teacher(replace(dense.shares, teacher_disk=0))  # nobody clears up where a worker is lost
        self._flow: BlockFlow  # of the calibration pass under way
        self._net: Supernet  # that questions are about

    @classmethod
    def opened(cls, opening: Opening, device: str) -> Worker:
        """A worker beside a model of its own, opened on a device; nobody asks it for text."""
        trusted = opening.trust_remote_code
        return cls(opened(opening.source, (), device=device, dtype=opening.dtype, trust_remote_code=trusted))

    def stream(self, tokens: TokenBatch, dense: bool) -> None:
        """Begin a calibration pass over these tokens."""
        self._flow = BlockFlow(self.dense.model, self.dense.adapter, tokens, dense=dense)

    def received(self, site: Site, statistics: Sequence[Statistic]) -> Moments:
        """As `BlockFlow.received`, of its tokens."""
        return self._flow.received(site, statistics)

    def received_by_expert(self, site: Site, statistics: Sequence[Statistic]) -> ExpertMoments:
        """As `BlockFlow.received_by_expert`, of its tokens."""
        return self._flow.received_by_expert(site, statistics)

    def carry(self, site: Site, weight: Float[Tensor, "d_out d_in"] | None) -> None:
        """As `BlockFlow.carry`."""
        self._flow.carry(site, weight)

    def advance(self, block: int, weights: Mapping[Site, Tensor] | None) -> None:
        """As `BlockFlow.advance`."""
        self._flow.advance(block, weights)

    def open_supernet(self, space: Space, errors: Table, store: CandidateStore) -> None:
        """The candidates that questions will be about; the calibration pass is over."""
        vars(self).pop("_flow", None)  # with its activations
        dense = self.dense
        self._net = Supernet(dense.model, dense.adapter, space, errors, store, dense.shares, self.teacher)

    def judge(self, objective: Objective, allocations: Sequence[Allocation], batch: TokenBatch) -> list[float]:
        """The losses of some allocations."""
        return [loss for _, loss in self._net.judged(objective, allocations, batch)]
