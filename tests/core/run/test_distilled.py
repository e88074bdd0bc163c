"""A whole run with a library of trained sub-layers: counted, planned, gone on with, in the model that is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prunekit
from prunekit import WrongInput
from prunekit.models.opening import skeleton
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.session import make_plan
from prunekit.run.stages import Run
from prunekit_strategies.pruners.distilled import Distilled

pytest.importorskip("scipy")
FEW: dict[str, Any] = {
    "allocator": {"name": "milp", "around": "dense", "stride": 0.5, "points": 2, "probe_tokens": 64, "candidates": 2},
    "pruner": {"name": "distilled", "inner": "magnitude", "steps": 4, "every": 2},
    "finishers": [],
    "verify": False,
}


@pytest.fixture(scope="module")
def folder(saved_tiny: Any) -> Path:
    return saved_tiny()


@pytest.fixture(scope="module")
def settings(quick: Callable[..., Any]) -> dict[str, Any]:
    return {"recipe": "puzzle"} | quick(**FEW)


@pytest.fixture(scope="module")
def whole(folder: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("puzzle") / "out"
    prunekit.prune(folder, output=output, **settings)
    return output


def test_what_candidates_were_trained_on_is_counted_and_planned(whole: Path, folder: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    records = [json.loads(line) for line in (whole / "ledger.jsonl").read_text().splitlines()]
    (trained,) = [record["tokens"] for record in records if record["kind"] == "training"]
    asked = sum(record["tokens"] for record in records if record["kind"] == "question")
    said = {"questions": report["search"]["questions"], "token_forwards": asked + trained}
    assert report["search"] == said | {"training_of_candidates": trained}
    plan = make_plan(resolve(Recipe.load(str(whole))), *skeleton(str(folder)), None)
    (planned,) = [stage for stage in plan.stages if stage.name == "prune 1"]
    assert trained <= planned.trained < 1.2 * trained  # those that gain nothing are not judged on all tokens
    assert f"candidates are trained on {planned.trained:,} token-forwards" in planned.told
    none = resolve(Recipe.load(str(whole)).with_overrides({"pruner.steps": 0}))
    assert not any(stage.trained for stage in make_plan(none, *skeleton(str(folder)), None).stages)


@pytest.mark.slow
def test_a_run_that_was_stopped_in_its_library_ends_in_the_same_bytes(
    whole: Path, folder: Path, settings: dict[str, Any], tmp_path: Path, killed_at: Any, content: Any
) -> None:
    with killed_at(Distilled, "prune", 3):
        prunekit.prune(folder, output=tmp_path / "out", **settings)
    with killed_at(Run, "ask_allocator", 1):
        prunekit.prune(folder, output=tmp_path / "out", **settings)
    prunekit.prune(folder, output=tmp_path / "out", **settings)
    assert content(tmp_path / "out") == content(whole)


def test_it_is_of_what_reaches_sub_layers_in_the_dense_model(settings: dict[str, Any]) -> None:
    with pytest.raises(WrongInput, match="trains sub-layers on what reaches them in the dense model"):
        resolve(Recipe.load("puzzle").with_overrides({"carry": "expected"}))
