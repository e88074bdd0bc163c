"""Trackers are told what the ledger and the report say, lead nothing, and take no run down with them."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunekit
from prunekit import Point, Setting, Track, Tracker, WrongInput
from prunekit.plugins.registry import UnknownName
from prunekit.run.tracking import build_trackers, split_options, tracked, tracker_specs
from prunekit.system.events import Events
from prunekit.system.progress import Progress, Several


@dataclass
class Kept(Track):
    """A run, in memory."""

    name: str
    parent: "Kept | None"
    settings: dict[str, Setting] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    done: bool | None = None

    def describe(self, settings: Mapping[str, Setting]) -> None:
        assert not settings.keys() & self.settings.keys()
        self.settings |= settings

    def log(self, points: Sequence[Point]) -> None:
        assert self.done is None
        self.points += points

    def close(self, *, done: bool) -> None:
        assert self.done is None
        self.done = done

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.points if point.name == name]


@dataclass(frozen=True, eq=False)
class Memory(Tracker):
    """Keeps all runs, and draws random numbers on the way; fails when it is told the `fails`-th time."""

    runs: list[Kept] = field(default_factory=list)
    fails: int = 0

    def open(self, name: str, parent: Track | None) -> Track:
        random.seed(random.random() + np.random.rand() + float(torch.rand(1)))
        assert parent is None or isinstance(parent, Kept)
        self.runs.append(Kept(name, parent) if not self.fails else Failing(name, parent))
        return self.runs[-1]


class Failing(Kept):
    def log(self, points: Sequence[Point]) -> None:
        raise OSError(28, "No space left on device")


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def questions(ledger: str) -> Iterator[tuple[int, float]]:
    """(token-forwards, loss) of every question of a ledger."""
    spent = 0
    for record in map(json.loads, ledger.splitlines()):
        if record["kind"] == "question":
            spent += 0 if "shared" in record else record["tokens"] + record.get("training", 0)
            yield spent, record["loss"]


@pytest.fixture(scope="module")
def asked(quick: Any, saved_tiny: Any) -> dict[str, Any]:
    return quick(model=str(saved_tiny()), sparsity=0.5, samples=0)


@pytest.fixture(scope="module")
def alone(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result that nobody has watched."""
    prunekit.prune(**asked, output=tmp_path_factory.mktemp("alone") / "half")
    return tmp_path_factory.getbasetemp() / "alone0/half"


# -- a run ------------------------------------------------------------------------------------------------


def test_the_curve_is_the_ledger_the_end_is_the_report_and_the_bytes_are_those_of_none(
    asked: dict[str, Any], alone: Path, tmp_path: Path, content: Any
) -> None:
    memory, other = Memory(), Memory(fails=1)
    said = Said()
    result = prunekit.prune(**asked, output=tmp_path / "half", track=[other, memory], progress=said)
    (run,) = memory.runs
    assert (run.name, run.parent, run.done) == ("half", None, True)
    names = [name for name in dict.fromkeys(point.name for point in run.points) if name.endswith("/loss")]
    assert [pair for name in names for pair in run.series(name)] == list(questions(result.ledger))
    for name in names:
        best = run.series(name.replace("/loss", "/best"))
        assert best[-1][1] == min(loss for _, loss in run.series(name))
    assert run.settings["pruner.name"] == "obs"
    assert run.settings["sparsity"] == 0.5
    last = {point.name: point.value for point in run.points}
    assert last["pruned/perplexity"] == result.report["losses"]["pruned"]["perplexity"]
    assert last["pruned/parameters"] == result.report["pruned"]["parameters"]
    assert last["token_forwards"] == result.report["search"]["token_forwards"]
    assert {"seconds/prune_1", "seconds/search_1"} <= last.keys()
    assert content(tmp_path / "half") == content(alone)
    failed = "warning: tracker Memory has failed (OSError: [Errno 28] No space left on device)"
    assert said.lines.count(f"{failed}; the run goes on without it") == 1


def test_a_replayed_run_tells_the_whole_curve_again(asked: dict[str, Any], tmp_path: Path, killed_at: Any) -> None:
    from prunekit.run import prune as pruning

    first, second = Memory(), Memory()
    with killed_at(pruning, "make_result", 1):
        prunekit.prune(**asked, output=tmp_path / "half", track=first)
    prunekit.prune(**asked, output=tmp_path / "half", track=second)
    curves = [[(p.name, p.step, p.value) for p in each.runs[0].points if "loss" in p.name] for each in (first, second)]
    assert curves[0] == curves[1]
    assert [each.runs[0].done for each in (first, second)] == [False, True]


def test_cells_of_a_comparison_are_parts_with_recipe_and_row(asked: dict[str, Any], tmp_path: Path) -> None:
    memory = Memory()
    keys = {key: value for key, value in asked.items() if key.startswith("data__") or key in ("model", "quiet")}
    cells = {"pruners": ["magnitude"], "allocators": ["uniform"], "recipe": "fast", "sparsity": [0.5]}
    found = prunekit.compare(**keys, **cells, output=tmp_path / "out", track=memory)
    whole, *parts = memory.runs
    assert whole.settings["suite.recipe"] == "fast"
    rows = {f"{row.cell}, 50%, seed 0": row for row in found.rows}
    assert {part.name for part in parts} <= rows.keys()
    assert len(parts) >= 2
    for part in parts:
        assert (part.parent, part.done) == (whole, True)
        assert part.series("perplexity")[-1][1] == rows[part.name].perplexity
        assert part.settings["sparsity"] == 0.5


def test_trials_of_a_study_are_parts_and_its_curve_is_the_best_so_far(asked: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    keys = {key: value for key, value in asked.items() if key.startswith("data__") or key in ("model", "quiet")}
    keys |= {"recipe": "fast", "allocator": "uniform", "space": {"pruner": ["magnitude", "obs"]}, "sparsity": 0.5}
    first, second = Memory(), Memory()
    found = prunekit.tune(**keys, output=tmp_path / "study", trials=2, track=first)
    whole, *parts = first.runs
    values = [row.values["perplexity"] for row in found.rows]
    assert whole.series("trial/perplexity") == list(enumerate(values))
    assert whole.series("trial/best_perplexity") == [(i, min(values[: i + 1])) for i in range(3)]
    told = {part.name: part.series("perplexity")[-1][1] for part in parts}
    assert told["base"] == values[0]
    assert set(told.values()) == set(values)  # a recipe that was run is not run again
    prunekit.tune(**keys, output=tmp_path / "study", trials=2, track=second)
    assert second.runs[0].series("trial/perplexity") == list(enumerate(values))


# -- what is told -----------------------------------------------------------------------------------------


def test_programs_are_told_the_same_as_trackers() -> None:
    lines, memory = list[bytes](), Memory()
    with tracked(Several([Events(lines.append)]), [memory], Path("out")) as progress:
        progress.describe({"a": {"b": [1, None, "x"]}})
        progress.measured({"search_1/loss": 0.5}, 32)
        with progress.part("trial-1") as part, part.stage("a stage, 0.5", 1):
            part.measured({"loss": 2.0}, 8)
    events = [event for event in map(json.loads, lines) if event["event"] in ("describe", "measured")]
    assert [(e["part"], e.get("step"), e.get("values", e.get("settings"))) for e in events] == [
        ("", None, {"a": {"b": [1, None, "x"]}}),
        ("", 32, {"search_1/loss": 0.5}),
        ("trial-1", 8, {"loss": 2.0}),
    ]
    whole, part = memory.runs
    assert whole.settings == {"a.b.0": 1, "a.b.2": "x"}
    assert whole.series("search_1/loss") == [(32, 0.5)]
    assert part.series("loss") == [(8, 2.0)]
    ((step, seconds),) = part.series("seconds/a_stage_0.5")
    assert (step, seconds >= 0) == (8, True)


def test_what_a_tracker_raises_is_said_once_and_an_interruption_goes_through() -> None:
    said, memory = Said(), Memory(fails=1)
    with tracked(said, [memory], None) as progress:
        for i in range(3):
            progress.measured({"loss": 1.0}, i)
            progress.describe({f"key{i}": i})
        with progress.part("one") as part:
            part.measured({"loss": 1.0})
    assert len(said.lines) == 1
    other = Memory()

    def interrupted() -> None:
        with tracked(Progress(), [other], None) as progress:
            progress.describe({"a": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [run.done for run in other.runs] == [False]


def test_nobody_is_opened_who_is_told_nothing() -> None:
    memory = Memory()
    with pytest.raises(WrongInput), tracked(Progress(), [memory], None):
        raise WrongInput("no such model")
    assert not memory.runs
    progress = Progress()
    with tracked(progress, [], None) as same:
        assert same is progress


# -- what is asked ----------------------------------------------------------------------------------------


def test_options_go_to_the_tracker_and_not_into_the_recipe() -> None:
    values, options = split_options({"damping": 0.1, "tracker.mlflow.experiment": "x", "tracker.folder": "y"})
    assert values == {"damping": 0.1}
    assert tracker_specs(["mlflow"], {"mlflow.experiment": "x"}) == [{"name": "mlflow", "experiment": "x"}]
    assert tracker_specs(["tensorboard"], {"folder": "y"}) == [{"name": "tensorboard", "folder": "y"}]
    with pytest.raises(WrongInput, match=r"--set tracker\.folder: trackers are tensorboard, mlflow; give --track NAME"):
        tracker_specs(["tensorboard", "mlflow"], {"folder": "y"})
    with pytest.raises(WrongInput, match=r"no tracker of this run 'mlflow'; there are none; give --track NAME"):
        tracker_specs([], options)
    with pytest.raises(UnknownName, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        build_trackers("tensorbord")
    memory = Memory()
    assert build_trackers(memory) == build_trackers([memory]) == [memory]
