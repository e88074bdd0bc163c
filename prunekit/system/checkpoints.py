"""Tensors that a long piece of work has made so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from prunekit.system.files import Damaged, digest, read_state, settle, settle_folder, temporary_of, write_state


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file beside, then rename: a reader sees the old file or the new one, whole."""
    temporary = temporary_of(path)
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    settle(temporary)
    temporary.replace(path)
    settle_folder(path.parent)


class Checkpoints:
    """Tensors that a long piece of work has made so far: after an interruption they are read, not made again."""

    def __init__(self, directory: Path | None = None) -> None:
        """Without a directory nothing is remembered."""
        self.directory = directory

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that were saved under a name; None: there are none, or not as they were saved."""
        path = self._path(name)
        return load_file(path) if path is not None and self.intact(name) else None

    def intact(self, name: str) -> bool:
        """Whether there are tensors of that name, as they were saved."""
        path = self._path(name)
        try:
            return path is not None and path.exists() and read_state(_seal(path)) == digest(path)
        except Damaged:
            return False

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember tensors, in the place of those of that name; all of them or none."""
        if (path := self._path(name)) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
        write_state(_seal(path), digest(path))  # until it is there, the tensors are not trusted

    def _path(self, name: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{name}.safetensors"


def _seal(path: Path) -> Path:
    return path.with_suffix(".json")
