"""A tracker for prunekit: where a run is watched while it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Tracker):
    """One CSV file for every run, with a line for every number, and its recipe as JSON beside it.

    Source: write here the program, and the page that says what it takes.
    """

    folder: str = "tracked"  # in which the files are

    def open(self, name: str, parent: pk.Track | None) -> pk.Track:
        """Begin a run there: your program goes here."""
        name = f"{parent.file.stem}, {name}" if isinstance(parent, Lines) else name
        number = 1
        while True:
            file = Path(self.folder, f"{name}.csv" if number == 1 else f"{name} {number}.csv")
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                file.touch(exist_ok=False)  # never over an earlier one
                break
            except FileExistsError:
                number += 1
        return Lines(file)


@dataclass
class Lines(pk.Track):
    """The file of one run."""

    file: Path

    def describe(self, settings: Mapping[str, pk.Setting]) -> None:
        """Keep what is run."""
        file = self.file.with_suffix(".json")
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | dict(settings), indent=2))

    def log(self, points: Sequence[pk.Point]) -> None:
        """Keep numbers."""
        with self.file.open("a") as file:
            file.writelines(f"{p.name},{p.step},{p.value!r},{p.at!r}\n" for p in points)

    def close(self, *, done: bool) -> None:
        """All of it is written."""
