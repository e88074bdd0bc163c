"""All that the exporters of a recipe make of a pruned model, written and proved."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from prunekit.errors import PluginError
from prunekit.plugins.exporter import Exporter, Probe, Product
from prunekit.plugins.guard import instance, unchanged


def write(exporters: Sequence[Exporter], product: Product, folder: Path) -> None:
    """Let every exporter write into the folder of a result, in turn.

    Raises:
        PluginError: one of them touched what is not its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for exporter in exporters:
        before = _state(folder)
        with unchanged(exporter, values=True, model=product.model):
            exporter.write(product, folder / exporter.place)
        after, own = _state(folder), {*instance(exporter, "what it calls its own", exporter.files(folder), list)}
        _open_to_readers(folder, after.keys() - before.keys())
        touched = [file for file in before.keys() | after.keys() if before.get(file) != after.get(file)]
        if strange := sorted(str(file.relative_to(folder)) for file in touched if file not in own or file in before):
            raise PluginError(f"{type(exporter).__name__} touched {', '.join(strange)}, which it does not call its own")


def prove(exporters: Sequence[Exporter], folder: Path, probe: Probe) -> None:
    """Let every exporter verify what it has written.

    Raises:
        NotVerified: says what differs.
    """
    for exporter in exporters:
        with unchanged(exporter, probe=probe):
            exporter.verify(folder / exporter.place, probe)


def _open_to_readers(folder: Path, files: Iterable[Path]) -> None:
    """Give new files the permissions that the user's umask gives: safetensors lets nobody else read."""
    probe = folder / ".permissions"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in files:
        file.chmod(mode | stat.S_IMODE(file.stat().st_mode))


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file."""
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}
