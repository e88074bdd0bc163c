"""Tensors that a long piece of work has made so far."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from prunekit.system.files import settle


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file beside, then rename: a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    settle(temporary)
    temporary.replace(path)


class Checkpoints:
    """Tensors that a long piece of work has made so far: after an interruption they are read, not made again."""

    def __init__(self, directory: Path | None = None) -> None:
        """Without a directory nothing is remembered."""
        self.directory = directory

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that were saved under a name; None: there are none."""
        path = self._path(name)
        return load_file(path) if path is not None and path.exists() else None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Remember tensors, in the place of those of that name; all of them or none."""
        if (path := self._path(name)) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)

    def _path(self, name: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{name}.safetensors"
