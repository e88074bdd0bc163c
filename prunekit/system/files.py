"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path


def settle(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it: a reader sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: object) -> None:
    """Write JSON in the same way."""
    write_bytes(path, json.dumps(content, indent=1).encode())
