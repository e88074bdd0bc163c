"""Judge an allocation by how far its hidden states are from the dense model's, beside another objective."""

from __future__ import annotations

from dataclasses import dataclass, field

import prunekit as pk
from prunekit_objectives.divergence import Divergence


@dataclass(frozen=True)
class HiddenState(pk.Objective):
    """Relative squared distance of the residual stream from the dense model's, at a few depths.

    With h_l(t) of the pruned model and h°_l(t) of the dense one, both (d,), behind the blocks l that `at` names:

        D(a) = mean over l and tokens t of ‖h_l(t) - h°_l(t)‖² / ‖h°_l(t)‖²          (1)
        J(a) = weight · D(a) + beside(a)                                            (2)

    Source: Týr-the-Pruner (arXiv 2503.09657), eq. 6: the first, the median and the last block, and the divergence
    of the logits. Ours: each token is measured against its own norm. A few tokens, the first of a window above all,
    have norms hundreds of times the others'; in a quotient of sums they would be all that counts.
    """

    at: tuple[float, ...] = (0.0, 0.5, 1.0)  # depths as shares: 0 behind the first block, 1 behind the last
    weight: float = 1.0  # of the distance, against what stands beside it
    beside: pk.Objective | None = field(default_factory=Divergence)  # None: the distance alone

    def __post_init__(self) -> None:
        if not self.at or not all(0 <= share <= 1 for share in self.at):
            raise ValueError(f"at is a list of depths from 0, the first block, to 1, the last, not {self.at}")
        if not self.weight > 0:
            raise ValueError(f"weight is more than 0, not {self.weight}; without the distance take what is beside it")
        if self.beside is not None and self.beside.training(1 << 40):
            raise ValueError(f"{type(self.beside).__name__} trains another model; let it wrap hidden-state instead")
        if self.beside is not None and not self.beside.reads(1).tokens:
            raise ValueError(f"beside is an objective that reads tokens, not {type(self.beside).__name__}")

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        depths, total = self._own(net.depth), 0.0
        pairs = zip(net.hidden(allocation, batch, depths), net.dense_hidden(batch, depths), strict=True)
        for mine, dense in pairs:
            for h, h0 in zip(mine, dense, strict=True):
                size = h0.float().square().sum(-1)
                total += float(((h - h0).float().square().sum(-1) / size.clamp_min(1e-12)).double().sum())  # (1)
        distance = total / (len(depths) * batch.n_tokens)
        return self.weight * distance + (self.beside.loss(net, allocation, batch) if self.beside else 0.0)  # (2)

    def check(self, batch: pk.TokenBatch) -> None:
        super().check(batch)
        if self.beside is not None:
            self.beside.check(batch)

    def reads(self, depth: int) -> pk.Reads:
        own = pk.Reads(depths=tuple(self._own(depth)))
        return own.joined(self.beside.reads(depth)) if self.beside else own

    def _own(self, blocks: int) -> list[int]:
        return sorted({round(share * (blocks - 1)) + 1 for share in self.at})
