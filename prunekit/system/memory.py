"""How much memory a run may take, how it is shared out, and where activations go when theirs is full."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GIB = 1 << 30


@dataclass(frozen=True)
class Shares:
    """Bytes for what a run holds: bounds that change when things are read again, never what comes out."""

    blocks: int | None = None  # of the dense model held at once on a device; None: all, for it was opened whole
    activations: int | None = None  # hidden states and inputs in memory, the rest goes to disk; None: all stay
    hidden: int = 2 * GIB  # hidden states of allocations kept for the objective to read
    dense: int = 2 * GIB  # hidden states of the dense model kept; more are made anew for every question
    parts: int = 4 * GIB  # cut-out sub-layers kept ready
    teacher: int = 2 * GIB  # what the dense model says of tokens, kept from the first search to the end of the run
    teacher_disk: int = 16 * GIB  # the same in files; what is beyond both is made anew for every question
    host: int = 0  # blocks kept in the host's memory, of a model that passes through devices of their own

    @classmethod
    def of(cls, free: int, *, paged: bool, own: int | None = None) -> Shares:
        """Share out `free` bytes, which nothing indispensable needs.

        A calibration pass holds blocks and activations, a search blocks, hidden states and parts, never all of them;
        logits of the dense model are held by both.

        Args:
            free: on every device.
            paged: whether blocks are read when they are needed.
            own: bytes of the blocks that are a device's own where several share them; they come first where they fit,
                for then none is read twice.
        """
        fifth = max(0, free) // 5
        blocks, part = fifth, fifth
        if own is not None and own <= 3 * fifth:
            blocks, part = own, (max(0, free) - own) // 4
        return cls(blocks if paged else None, part * (3 if paged else 4), part, part, part, part)

    def split(self, activations: int) -> tuple[int, int]:
        """Split bytes of activations into (bytes in memory, bytes on disk)."""
        inside = activations if self.activations is None else min(activations, self.activations)
        return inside, activations - inside


SHARES = Shares()
"""Nothing is bounded but what a search holds."""


def available(device: torch.device) -> int:
    """Count the free bytes of a device: of the machine, or of what its container allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo, free = Path("/proc/meminfo"), []
    if meminfo.exists():
        (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        free.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (most := (group / "memory.max").read_text().strip()) != "max":
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / "memory.current").read_text()) - int(used.get("inactive_file", 0))
        free.append(int(most) - taken)
    if not free:  # no Linux: all of it, for how much is free is unknown
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def give_back() -> None:
    """Return to the system what the C library keeps of freed memory, in which large tensors often find no place."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # that of GNU
        trim(0)


class Room:
    """Where activations are kept: in memory as far as the bound allows, the others in files of its own.

    No two rooms of a process name a file alike: what is left of a room that failed is freed late, and may lie in the
    folder of the next.

    The first ones stay in memory: they are read in turn, again and again, so that a tensor that was moved out to make
    room would be the next to be read.
    """

    _numbers = count()

    def __init__(self, bound: int | None = None, folder: Path | None = None) -> None:
        """Files go to `folder`, or to a temporary one; None: no bound."""
        self.bound, self.folder = bound, folder
        self.held = 0  # bytes in memory
        self.spilled = 0  # bytes in files

    def row(self, tensors: Iterable[Tensor] = ()) -> Row:
        """Make a list of tensors that are kept here."""
        row = Row(self)
        row.extend(tensors)
        return row

    def put(self, tensor: Tensor) -> Kept:
        """Keep one tensor."""
        if self.bound is None or self.held + tensor.nbytes <= self.bound:
            return Kept(self, tensor, None, tensor.nbytes)
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="prunekit-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{next(self._numbers)}.safetensors"
        save_file({"": tensor.detach().cpu().contiguous()}, file)
        return Kept(self, file, tensor.device, tensor.nbytes)

    def _count(self, size: int, *, in_file: bool) -> None:
        if in_file:
            self.spilled += size
        else:
            self.held += size


class Kept:
    """A tensor in a room; its memory or file is freed with the last reference to it."""

    def __init__(self, room: Room, kept: Tensor | Path, device: torch.device | None, size: int) -> None:
        self._kept, self._device = kept, device
        file = kept if isinstance(kept, Path) else None
        room._count(size, in_file=file is not None)
        weakref.finalize(self, _release, room, file, size)

    def get(self) -> Tensor:
        """The tensor, bit for bit."""
        if isinstance(self._kept, Tensor):
            return self._kept
        with safe_open(self._kept, "pt") as file:
            return file.get_tensor("").to(self._device)


def _release(room: Room, file: Path | None, size: int) -> None:
    room._count(-size, in_file=file is not None)
    if file is not None:
        file.unlink(missing_ok=True)


class Row(MutableSequence[Tensor]):
    """A list of tensors, each kept in memory or in a file."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self._kept: list[Kept] = []

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [kept.get() for kept in self._kept[index]]
        return self._kept[index].get()

    def __setitem__(self, index: Any, value: Any) -> None:
        self._kept[index] = None  # type: ignore[call-overload]  its place first: the new one may take it
        self._kept[index] = self.room.put(value)

    def __delitem__(self, index: int | slice) -> None:
        del self._kept[index]

    def __len__(self) -> int:
        return len(self._kept)

    def insert(self, index: int, value: Tensor) -> None:
        self._kept.insert(index, self.room.put(value))
