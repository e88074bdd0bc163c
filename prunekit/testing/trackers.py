"""What every tracker promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from prunekit.plugins.registry import plain
from prunekit.plugins.tracker import Point, Setting, Track, Tracker
from prunekit.run.tracking import tracked
from prunekit.system.progress import Progress

SETTINGS: Mapping[str, Setting] = {"model": "a|b\n", "sparsity": 0.5, "pruner.name": "obs", "verify": True, "seed": 0}
Kept = Mapping[str, Sequence[tuple[int, float]]]
"""By series, (step, value) in order."""


def points(start: int = 0) -> list[Point]:
    """Of a search of three questions, two of them at one step, one of which failed, and of its end."""
    found = [("search_1/loss", 2.0, 16), ("search_1/loss", math.inf, 16), ("search_1/loss", 0.5, 32)]
    found += [("search_1/best", 0.5, 32), ("pruned/perplexity", 12.25, 32)]
    return [Point(name, value, start + step, 1.7e9 + i) for i, (name, value, step) in enumerate(found)]


class Said(Progress):
    """Keeps the lines that the user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


class TrackerSuite:
    """Runs go side by side, keep what they were told, and disturb nobody."""

    plugin: ClassVar[Tracker]

    @pytest.fixture(autouse=True)
    def own_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the tracker may write: default places are in the folder of the process."""
        monkeypatch.chdir(tmp_path)

    def kept(self, track: Track) -> Kept | None:
        """What a closed run holds, read anew; None: a suite does not know how."""
        return None

    def test_what_was_told_is_kept_and_no_run_takes_the_place_of_another(self) -> None:
        """A run, a part within it, and a second run of the same name."""
        self.plugin.check()
        first = self.plugin.open("half", None)
        first.describe(SETTINGS)
        first.describe({"late": 1})
        first.log(points())
        part = self.plugin.open("trial-1", first)
        part.describe({"seed": 1})
        part.log(points(100))
        part.close(done=True)
        first.log(points(32))
        first.close(done=True)
        second = self.plugin.open("half", None)
        second.log(points(7))
        second.close(done=False)
        for track, starts in ((first, (0, 32)), (part, (100,)), (second, (7,))):
            if (kept := self.kept(track)) is not None:
                for name in ("search_1/loss", "search_1/best", "pruned/perplexity"):
                    told = [(p.step, p.value) for start in starts for p in points(start) if p.name == name]
                    assert list(kept[name]) == [(step, pytest.approx(value)) for step, value in told]

    def test_a_run_without_numbers_or_settings_opens_and_closes(self) -> None:
        for done in (True, False):
            self.plugin.open("empty", None).close(done=done)

    def test_nothing_is_said_and_random_numbers_are_as_without(self, capfd: pytest.CaptureFixture[str]) -> None:
        """Of the process: standard output is for results. The core puts random state back, whoever draws."""
        before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]
        said = Said()
        with tracked(said, [self.plugin], Path("quiet")) as progress:
            with progress.part("inner") as part:
                part.measured({"loss": 1.0}, 3)
            progress.describe({"seed": 0})
        assert not said.lines
        assert capfd.readouterr().out == ""
        after = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]
        assert after == before

    def test_options_are_plain_values(self) -> None:
        values: dict[str, Any] = {f.name: getattr(self.plugin, f.name) for f in dataclasses.fields(self.plugin)}  # type: ignore[arg-type]
        json.dumps({name: plain(value) for name, value in values.items()})
