"""The records of a run that is over, to be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a ledger; a line that cannot be read ends it."""
    found = list[dict[str, Any]]()
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if isinstance(record, dict):
            found.append(record)
    return found
