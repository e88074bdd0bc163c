"""How much memory a run may take, how it is shared out, and where activations go when theirs is full."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, overload

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunekit.errors import WrongInput

GIB = 1 << 30
SIZE = re.compile(r"\d+(\.\d+)?\s*([kmgt]?i?b)?", re.IGNORECASE)  # ByteSize reads as far as it can: 1,5GB as 1 byte


@dataclass(frozen=True)
class Shares:
    """Bytes for what a run holds: bounds that change when things are read again, never what comes out."""

    blocks: int | None = None  # of the dense model held at once; None: all, for it was opened whole
    activations: int | None = None  # hidden states and inputs in memory, the rest goes to disk; None: all stay
    hidden: int = 2 * GIB  # hidden states of allocations kept for the objective to read
    dense: int = 2 * GIB  # hidden states of the dense model kept; more are made anew for every question
    parts: int = 4 * GIB  # cut-out sub-layers kept ready
    teacher: int = 2 * GIB  # what the dense model says of tokens, kept from the first search to the end of the run
    teacher_disk: int = 16 * GIB  # the same in files; what is beyond both is made anew for every question

    @classmethod
    def of(cls, free: int, *, paged: bool) -> Shares:
        """`free` bytes beside what cannot be done without, shared out.

        A calibration pass holds blocks and activations, a search blocks, hidden states and parts, never all of them;
        what the teacher said is held by both.
        """
        fifth = max(0, free) // 5
        return cls(fifth if paged else None, fifth * (3 if paged else 4), fifth, fifth, fifth, fifth)

    def split(self, activations: int) -> tuple[int, int]:
        """So many bytes of activations, as (bytes in memory, bytes on disk)."""
        inside = activations if self.activations is None else min(activations, self.activations)
        return inside, activations - inside


SHARES = Shares()
"""Nothing is bounded but what a search holds."""


def parsed(text: str | int) -> int | None:
    """Bytes; None for auto.

    Raises:
        WrongInput: it is no amount of memory.
    """
    text = str(text).strip()
    if text == "auto":
        return None
    try:
        size = TypeAdapter(ByteSize).validate_python(text) if SIZE.fullmatch(text) else 0
    except ValidationError:
        size = 0
    if size < 1:
        raise WrongInput(f"no amount of memory {text!r}; give auto, or as 8GiB, 500MB")
    return int(size)


def amount(number: float) -> str:
    """Bytes for people: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:,.0f} B" if unit == "B" else f"{number:,.2f} {unit}"


def available(device: torch.device) -> int:
    """Bytes that may still be taken on a device: of the machine, or of what a container allows."""
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
    if not free:  # no Linux: as much as there is; nobody says how much of it is free
        import os

        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


class Room:
    """Where activations are kept: in memory as long as the bound allows, the others in files, which nobody else reads.

    Those that came first stay in memory: streams are gone through in circles, and whatever was let go
    to make room would be what is needed next.
    """

    def __init__(self, bound: int | None = None, folder: Path | None = None) -> None:
        """Files go to `folder`, or to a temporary one; None: no bound."""
        self.bound, self.folder = bound, folder
        self.held = 0  # bytes in memory
        self.spilled = 0  # bytes in files
        self._names = count()

    def row(self, tensors: Iterable[Tensor] = ()) -> Row:
        """A list of tensors kept here."""
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
        file = self.folder / f"{next(self._names)}.safetensors"
        save_file({"": tensor.detach().cpu().contiguous()}, file)
        return Kept(self, file, tensor.device, tensor.nbytes)

    def _changed(self, kept: Tensor | Path, size: int) -> None:
        if isinstance(kept, Path):
            self.spilled += size
        else:
            self.held += size


class Kept:
    """A tensor in a room; it makes place when nobody refers to it."""

    def __init__(self, room: Room, kept: Tensor | Path, device: torch.device | None, size: int) -> None:
        self._kept, self._device = kept, device
        room._changed(kept, size)
        weakref.finalize(self, _let_go, room, kept if isinstance(kept, Path) else None, size)

    def get(self) -> Tensor:
        """The tensor, bit for bit."""
        if isinstance(self._kept, Tensor):
            return self._kept
        with safe_open(self._kept, "pt") as file:
            return file.get_tensor("").to(self._device)


def _let_go(room: Room, file: Path | None, size: int) -> None:
    if file is None:
        room.held -= size
    else:
        room.spilled -= size
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
