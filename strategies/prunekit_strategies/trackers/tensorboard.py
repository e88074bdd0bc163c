"""Event files for TensorBoard: `tensorboard --logdir runs`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tensorboard  # noqa: F401  # whose absence is said by name; the writer below needs it
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from prunekit import Point, Setting, Track, Tracker, WrongInput


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """Event files for TensorBoard: a curve for every series, the recipe as text and as hyper-parameters.

    Every run has a folder of its own, with a number behind its name where there is one already, and parts are folders
    in it, which TensorBoard draws into one chart. Steps are as they are counted, times those of measuring.

    Source: Abadi et al. 2016, TensorFlow, arXiv 1603.04467, section 9.1; the files are those of torch's SummaryWriter.
    """

    folder: str = "runs"  # in which the folders of runs are

    def check(self) -> None:
        there = Path(self.folder).absolute()
        while not there.exists():
            there = there.parent
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise WrongInput(
                f"tracker tensorboard would write to {self.folder}, and {there} is no folder that can be written to; "
                "name another with --set tracker.tensorboard.folder=DIR"
            )

    def open(self, name: str, parent: Track | None) -> Track:
        home = parent.place if isinstance(parent, EventFiles) else Path(self.folder)
        number = 1
        while True:
            place = home / (name if number == 1 else f"{name}-{number}").replace("/", "_")
            try:
                place.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        return EventFiles(place, SummaryWriter(str(place)))


@dataclass
class EventFiles(Track):
    """The event files of one run."""

    place: Path
    writer: SummaryWriter
    settings: dict[str, Setting] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)  # value of every series

    def describe(self, settings: Mapping[str, Setting]) -> None:
        self.settings |= settings
        rows = "\n".join(f"| {key} | {value} |" for key, value in self.settings.items())
        self.writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}")
        self.writer.flush()

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self.writer.add_scalar(point.name, point.value, point.step, point.at)
            self.last[point.name] = point.value
        self.writer.flush()

    def close(self, *, done: bool) -> None:
        if done and self.settings:
            assert self.writer.file_writer is not None  # until it is closed
            for summary in hparams(self.settings, self.last):  # `add_hparams` would have all values a second time
                self.writer.file_writer.add_summary(summary)
        self.writer.close()
