"""Runs of Weights & Biases, kept in a folder until they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import wandb  # pyright: ignore[reportMissingImports]  # an extra

from prunekit import Point, Setting, Track, Tracker, check_choices

STEP = "step"  # by which all series are drawn: W&B's own step only counts


@dataclass(frozen=True)
class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, the recipe as its config, series by the steps that are counted, parts as one group.

    Offline, as it is unless it is said otherwise, nothing leaves this machine: `wandb sync wandb/offline-run-*` sends
    it later. Online it needs a key, as `wandb login` keeps it.

    Source: https://docs.wandb.ai, wandb.init and define_metric.
    """

    mode: Literal["offline", "online"] = "offline"
    project: str = "prunekit"
    folder: str = "."  # in which W&B makes its own, wandb

    def __post_init__(self) -> None:
        check_choices(self)

    def open(self, name: str, parent: Track | None) -> Track:
        above = parent.name if isinstance(parent, WandbRun) else ""
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            mode=self.mode,
            project=self.project,
            dir=self.folder,
            name=f"{above}/{name}" if above else name,
            group=above or name,
            reinit="create_new",  # parts are open beside their whole
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        return WandbRun(run, above or name)


@dataclass
class WandbRun(Track):
    """One run there."""

    run: Any
    name: str  # of the command's run

    def describe(self, settings: Mapping[str, Setting]) -> None:
        self.run.config.update(dict(settings))

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            self.run.log({point.name: point.value, STEP: point.step})

    def close(self, *, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)
