"""What a run will take on this machine: memory, disk and time of every stage, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from prunekit.errors import WrongInput
from prunekit.system.memory import Shares
from prunekit.system.rates import Rates
from prunekit.system.sizes import amount

HEARING = "dense model"  # a stage of nobody's own: the first question waits for it
SEARCH = "search"  # names of stages that ask questions begin so


@dataclass(frozen=True)
class Stage:
    """What one part of a run takes. Memory is beside what the process itself holds."""

    name: str
    memory: int  # bytes that it cannot do without
    shared: int = 0  # bytes it makes use of beyond, of what bounds allow
    disk: int = 0  # bytes that are written, to stay until the end
    spilled: int = 0  # bytes of activations that lie on disk beside them while it is at work
    read: int = 0  # bytes that are read
    flops: int | None = 0  # in the dtype of the computation; None: nobody knows
    doubles: int = 0  # in float64
    own: float = 0.0  # seconds of plug-ins, as they were tried
    unknown: str = ""  # what else takes time
    spread: tuple[int, int] | None = None  # FLOPs at the least and the most; None: `flops` alone
    member: str = ""  # of a family, by its sparsity, that has this stage to itself
    trained: int = 0  # token-forwards that candidates are trained on

    @property
    def told(self) -> str:
        """What there is to say of it beside numbers."""
        trained = f"candidates are trained on {self.trained:,} token-forwards" if self.trained else ""
        return "; ".join(filter(None, (trained, self.unknown)))

    @property
    def writes(self) -> int:
        """Bytes that it puts on disk, whether they stay or not."""
        return self.disk + self.spilled

    def seconds(self, rates: Rates) -> float | None:
        """How long that takes; None: nobody knows."""
        if self.flops is None:
            return None
        products = self.flops / rates.flops + self.doubles / rates.doubles
        return products + self.own + self.writes / rates.write + self.read / rates.read

    def between(self, rates: Rates) -> tuple[float, float] | None:
        """Seconds at the least and the most, where they differ."""
        if (likely := self.seconds(rates)) is None or self.spread is None or self.spread[0] == self.spread[1]:
            return None
        least, most = (likely + (flops - (self.flops or 0)) / rates.flops for flops in self.spread)
        return least, most


@dataclass(frozen=True)
class Plan:
    """The stages of a run on this machine, and how its memory is shared out."""

    stages: tuple[Stage, ...]
    limit: int  # bytes of memory that may be taken
    free_disk: int | None  # bytes where the run works, those of an unfinished one too; None: there is no output
    shares: Shares
    resident: int  # bytes of embeddings and norms, which are always there when blocks are paged
    block: int  # bytes of the largest block
    device: torch.device
    dtype: torch.dtype  # of the computation
    place: Path | None  # where the run works, as far as it exists
    forward: int  # FLOPs of a token through the model at the size it will have
    measured: str = ""  # the metric that is measured, on whole models
    devices: Sequence[torch.device] = ()  # that the run may use; of a paged model its blocks are dealt out to them

    @property
    def paged(self) -> bool:
        """Whether blocks of the dense model are read when they are needed."""
        return self.shares.blocks is not None

    @property
    def least(self) -> int:
        """Bytes of memory that the hungriest stage cannot do without."""
        return max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """The most that lies there at once: what is written stays to the end, what is spilled goes with its stage."""
        written = accumulate(stage.disk for stage in self.stages)
        return max(stays + stage.spilled for stays, stage in zip(written, self.stages, strict=True))

    @property
    def members(self) -> list[str]:
        """Of a family, those that have stages to themselves."""
        return list(dict.fromkeys(stage.member for stage in self.stages if stage.member))

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            WrongInput: what is too large, what there is, and what would fit.
        """
        worst = max(self.stages, key=lambda stage: stage.memory)
        if worst.memory > self.limit:
            how = "block by block " if self.paged else ""
            less = "shorter windows, or an allocator with fewer rungs"
            if self.measured:
                less = f"or another metric: {self.measured} is timed on whole models, never block by block"
            raise WrongInput(
                f"{worst.name} takes at least {amount(worst.memory)} of memory {how}beside the process itself, and "
                f"{amount(max(0, self.limit))} are there; give more, {less}"
            )
        if self.free_disk is not None and self.disk > self.free_disk:
            largest = max(self.stages, key=lambda stage: stage.writes)
            less = "fewer search tokens" if largest.name == HEARING else "an allocator with fewer rungs"
            raise WrongInput(
                f"this run writes {amount(self.disk)}, {largest.name} alone {amount(largest.writes)}, and the disk has "
                f"{amount(self.free_disk)} free; make room, choose another --output, or {less}"
            )

    def as_dict(self, rates: Rates) -> dict[str, Any]:
        """For programs: bytes and seconds; None where nobody knows."""
        rows: list[dict[str, Any]] = [
            asdict(stage) | {"seconds": stage.seconds(rates), "between": stage.between(rates)} for stage in self.stages
        ]
        known = [row["seconds"] for row in rows if row["seconds"] is not None]
        of = {name: [row for row in rows if row["member"] == name] for name in self.members}
        return {
            "stages": rows,
            "memory": max(stage.memory + stage.shared for stage in self.stages),
            "disk": self.disk,
            "members": [
                {
                    "sparsity": float(name),
                    "disk": sum(row["disk"] for row in own),
                    "seconds_known": sum(row["seconds"] or 0.0 for row in own),
                }
                for name, own in of.items()
            ],
            "seconds_known": sum(known),
            "seconds_complete": len(known) == len(rows) and not any(stage.unknown for stage in self.stages),
            "paged": self.paged,
            "memory_limit": self.limit,
            "disk_free": self.free_disk,
            "resident": self.resident,
            "block": self.block,
            "shares": asdict(self.shares),
            "rates": asdict(rates),
        }
