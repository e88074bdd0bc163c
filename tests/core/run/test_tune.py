"""A study on a tiny model: it finds, resumes, shares calibration passes, and refuses in sentences."""

import json
import math
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import prunekit
from prunekit.cli import main as cli
from prunekit.errors import CannotGoOn, WrongInput
from prunekit.recipe.resolve import Parts
from prunekit.recipe.schema import Recipe
from prunekit.run import stages
from prunekit.run.clock import Clock

tuning = pytest.importorskip("prunekit.run.tune")
LETTERS = "abcdefghijklmnopqrstuvwxyz "
SPACE = {"damping": {"low": 1e-3, "high": 0.1, "log": True}, "pruner": ["wanda", "magnitude", "obs"]}
QUICK: dict[str, Any] = {
    "recipe": "fast",
    "allocator": "uniform",
    "objective": {"name": "expected-error", "table": "errors"},
    "rebuild": False,
    "data__calibration_tokens": 128,
    "data__search_tokens": 128,
    "data__evaluation_tokens": 64,
    "data__seqlen": 16,
    "quiet": True,
}


@pytest.fixture(scope="module")
def model(saved_letters: Callable[..., Path]) -> Path:
    return saved_letters(initializer_range=0.5)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "noise.txt"
    file.write_text("".join(random.Random(0).choices(LETTERS, k=20_000)))
    return file


@pytest.fixture
def quick(model: Path, text: Path, tmp_path: Path) -> dict[str, Any]:
    return QUICK | {"model": model, "data__dataset": str(text), "output": tmp_path / "study"}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pruner of every calibration pass that was really made."""
    seen: list[str] = []
    whole = stages.build

    def build(*arguments: Any, **options: Any) -> Any:
        store, space = arguments[6], arguments[2]
        if any(site not in store for site in space.sites):
            seen.append(type(arguments[4]).__name__)
        return whole(*arguments, **options)

    monkeypatch.setattr(stages, "build", build)
    return seen


def points(tuned: Any) -> list[Any]:
    return [(row.name, row.state, row.overrides, row.values, row.recipe) for row in tuned.rows]


def test_the_best_recipe_is_the_best_row_and_prunes_to_what_was_measured(quick, text: Path, tmp_path: Path) -> None:
    tuned = prunekit.tune(**quick, space=SPACE, trials=3)
    values = [row.values["perplexity"] for row in tuned.rows]
    assert len(values) == 4
    assert tuned.front[0].values["perplexity"] == min(values)
    best = Recipe.load(quick["output"] / "best.yaml")
    assert best == tuned.best
    result = prunekit.prune(recipe=best, quiet=True)  # its test text is further on: the tuning text was the search text
    search = result.report["data"]["search"]["sha256"]
    assert search == (tuned.base.data.digests or {})["search"] != result.report["data"]["evaluation"]["sha256"]
    again = prunekit.tune(**quick, space=SPACE, trials=3)  # nothing left to do
    assert points(again) == points(tuned)


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_an_interrupted_study_goes_on_to_the_same_study(quick, tmp_path: Path, killed_at, after: int) -> None:
    whole = prunekit.tune(**quick | {"output": tmp_path / "whole"}, space=SPACE, trials=3)
    with killed_at(stages.CandidateStore, "put", after + 1):
        prunekit.tune(**quick, space=SPACE, trials=3)
    assert points(prunekit.tune(**quick, space=SPACE, trials=2))[:3] == points(whole)[:3]
    assert points(prunekit.tune(**quick, space=SPACE, trials=3)) == points(whole)


@pytest.mark.parametrize("call", ["create_new_trial", "set_trial_user_attr", "set_trial_state_values"])
@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_study_killed_where_it_is_written_goes_on_to_the_same_study(
    quick, tmp_path: Path, monkeypatch, call: str, before: bool
) -> None:
    whole = prunekit.tune(**quick | {"output": tmp_path / "whole"}, space=SPACE, trials=2)
    storage = tuning.optuna.storages.JournalStorage
    made = getattr(storage, call)

    def die(*arguments: Any, **options: Any) -> None:
        if not before:
            made(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, call, die)
        with pytest.raises(KeyboardInterrupt):
            prunekit.tune(**quick, space=SPACE, trials=2)
    (quick["output"] / "study.log.lock").symlink_to("study.log")  # a process that is killed lets go of nothing
    assert points(prunekit.tune(**quick, space=SPACE, trials=2)) == points(whole)
    assert not list(quick["output"].glob("study.log.*"))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["nsga-ii", "nsga-iii"])
def test_generations_are_bred_and_survive_an_interruption(quick, tmp_path: Path, monkeypatch, sampler: str) -> None:
    few = {"nsga-ii": tuning.optuna.samplers.NSGAIISampler, "nsga-iii": tuning.optuna.samplers.NSGAIIISampler}[sampler]
    monkeypatch.setitem(tuning.SAMPLERS, sampler, lambda seed: few(population_size=4, seed=seed))
    options = {"space": SPACE, "sampler": sampler, "metric": ["perplexity", "seconds"]}
    monkeypatch.setattr(Clock, "add", lambda *_: None)  # seconds of this machine are no function of a recipe
    whole = prunekit.tune(**quick | {"output": tmp_path / "whole"}, **options, trials=10)
    prunekit.tune(**quick, **options, trials=6)
    assert points(prunekit.tune(**quick, **options, trials=10)) == points(whole)
    assert any("generation" in key for trial in whole.study.trials for key in trial.system_attrs)


def test_passes_are_shared_where_only_the_search_differs(quick, passes: list[str]) -> None:
    space = {
        "allocator": [
            {"name": "softmax", "table": "errors", "rule": ["fermi", "softmax"]},
            {"name": "evolution", "generations": {"low": 1, "high": 2}, "offspring": 2},
        ],
        "objective": ["expected-error", "divergence", {"name": "hidden-state", "beside": [None, "divergence"]}],
    }
    tuned = prunekit.tune(**quick | {"allocator": {"name": "softmax", "table": "errors"}}, space=space, trials=8)
    assert len({row.recipe for row in tuned.rows}) > 3
    assert passes == ["OBS"]
    prunekit.tune(**quick | {"output": quick["output"].with_name("two")}, space=SPACE | {"damping": 0.01}, trials=8)
    assert sorted(passes[1:]) == ["Magnitude", "OBS", "Wanda"]


def test_a_learner_in_a_study_comes_to_what_it_comes_to_in_a_run(quick) -> None:
    learners = [{"name": "gisp", "steps": 2, "tokens": 64}, {"name": "grasprune", "steps": 4, "batch_tokens": 16}]
    own = quick | {"objective": "divergence", "metric": ["objective", "perplexity"]}
    tuned = prunekit.tune(**own, space={"learner": learners}, trials=4)
    names = [row.overrides.get("learner", {}).get("name") for row in tuned.rows]
    assert {*names} == {None, "gisp", "grasprune"}
    for name in ("gisp", "grasprune"):
        row = tuned.rows[names.index(name)]
        report = prunekit.prune(recipe=tuned.base.with_overrides(row.overrides), quiet=True).report
        assert report["losses"]["objective"] == row.values["objective"]
        assert report["learner"]["name"] == name


def test_a_recipe_is_run_once(quick, monkeypatch) -> None:
    runs: list[Any] = []
    judge = tuning.Bench.judge
    monkeypatch.setattr(tuning.Bench, "judge", lambda self, *asked: runs.append(asked[0].digest) or judge(self, *asked))
    tuned = prunekit.tune(**quick, space={"pruner": ["wanda", "magnitude"]}, trials=7)
    assert len(tuned.rows) == 8
    assert len(runs) == len(set(runs)) == 3  # the base is neither of them
    assert len({tuple(row.values.items()) for row in tuned.rows}) == 3


def test_a_full_shelf_lets_the_longest_unused_pass_go(quick, passes: list[str]) -> None:
    prunekit.tune(**quick, space={"pruner": ["wanda", "magnitude"]}, trials=1)
    shelf = quick["output"] / "walks"
    (shelf / "mine").mkdir()
    first, second = sorted(shelf.glob("walk-*"), key=lambda walk: walk.stat().st_mtime)
    room = sum(file.stat().st_size for file in second.iterdir())
    nothing: Any = None
    tuning.Bench(nothing, quick["output"], room)._tidy(shelf)
    assert {*shelf.iterdir()} == {second, shelf / "mine"}
    assert first != second
    assert len(passes) == 2


def test_several_metrics_make_a_front(quick) -> None:
    space = {"sparsity": {"low": 0.2, "high": 0.8}, "pruner": ["magnitude", "obs"]}
    tuned = prunekit.tune(**quick, space=space, metric=["loss", "parameters"], trials=6)
    values = {row.name: (row.values["loss"], row.values["parameters"]) for row in tuned.rows}
    front = [values[row.name] for row in tuned.front]
    for a in front:
        assert not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in values.values())
    for b in values.values():
        assert any(a[0] <= b[0] and a[1] <= b[1] for a in front)
    assert front == sorted(front)
    files = sorted(quick["output"].glob("pareto-*.yaml"))
    assert len(files) == len(front)
    assert Recipe.load(files[0]) == Recipe.load(quick["output"] / "best.yaml") == tuned.best


def test_what_cannot_be_is_pruned_and_what_breaks_fails(quick, monkeypatch) -> None:
    space = {"of": ["blocks", "model"], "apart": [False, True], "pruner": ["magnitude", "wanda"]}
    judge = tuning.Bench.judge

    def breaking(self: Any, parts: Parts, name: str, metrics: Any) -> Any:
        if parts.recipe.pruner["name"] == "wanda":
            raise RuntimeError("out of memory\nand more")
        return judge(self, parts, name, metrics)

    monkeypatch.setattr(tuning.Bench, "judge", breaking)
    tuned = prunekit.tune(**quick | {"sparsity": 0.1}, space=space, trials=12)
    for row in tuned.rows[1:]:
        chosen = row.overrides
        impossible = chosen["of"] == "model" and chosen["apart"]
        expected = "pruned" if impossible else "fail" if chosen["pruner"] == "wanda" else "complete"
        assert (row.state, bool(row.values)) == (expected, expected == "complete")
    assert {row.state for row in tuned.rows} == {"complete", "pruned", "fail"}
    assert "RuntimeError: out of memory" in {row.reason for row in tuned.rows}
    assert any("does not go with of=model" in row.reason for row in tuned.rows)


def test_a_study_in_which_nothing_ends_well_says_why(quick, monkeypatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tuning.Bench, "judge", broken)
    with pytest.raises(CannotGoOn, match="none of 3 recipes ended well; the last said: RuntimeError: out of memory"):
        prunekit.tune(**quick, space=SPACE, trials=2)


def test_other_calibration_text_is_judged_on_the_same_tokens(quick, text: Path, tmp_path: Path) -> None:
    space = {"data.calibration_draw": [0, 1, 2], "pruner": ["wanda", "magnitude"]}
    tuned = prunekit.tune(**quick, space=space, trials=6)
    assert {row.state for row in tuned.rows} == {"complete"}
    wanda = {
        r.overrides["data.calibration_draw"]: r.values["perplexity"]
        for r in tuned.rows[1:]
        if r.overrides["pruner"] == "wanda"
    }
    assert len(set(wanda.values())) == len(wanda) > 1
    other = tmp_path / "other.txt"
    other.write_text("".join(random.Random(1).choices(LETTERS, k=9_000)))
    moved = {"data.dataset": [str(text), str(other)], "data.calibration_tokens": [64, 128]}
    with pytest.raises(WrongInput, match=r"where data\.dataset is tuned, evaluation needs a text of its own"):
        prunekit.tune(**quick | {"output": tmp_path / "moved"}, space=moved, trials=4)
    apart = quick | {"output": tmp_path / "moved", "data__evaluation_dataset": str(other)}
    tuned = prunekit.tune(**apart, space=moved, trials=4)
    assert {row.state for row in tuned.rows} == {"complete"}
    assert tuned.base.data.calibration_tokens == 128


def test_a_pipe_that_every_trial_would_read_is_refused_and_one_that_is_read_once_is_not(
    quick, text: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with pytest.raises(WrongInput, match=r"pipe\.txt is a named pipe, which can be read once"):
        prunekit.tune(**quick | {"data__dataset": str(pipe)}, space={"data.calibration_draw": [0, 1]}, trials=1)
    writer = threading.Thread(target=pipe.write_text, args=(text.read_text(),))
    writer.start()
    tuned = prunekit.tune(**quick | {"data__dataset": str(pipe)}, space=SPACE, trials=1)
    writer.join()
    assert {row.state for row in tuned.rows} == {"complete"}


def test_calibrating_on_the_text_of_the_comparison_is_pruned(quick, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_text(text.read_text()[128:])  # begins where the search text of the other does
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text("abc " * 500)
    tuned = prunekit.tune(
        **quick | {"data__evaluation_dataset": str(evaluation)},
        space={"data.dataset": [str(text), str(copy)]},
        trials=4,
    )
    assert {(row.overrides["data.dataset"] == str(copy), row.state) for row in tuned.rows[1:]} <= {
        (False, "complete"),
        (True, "pruned"),
    }
    assert any("learns from text that trials are compared on" in row.reason for row in tuned.rows)


def test_questions_are_tuned_by_their_objective(quick, tmp_path: Path) -> None:
    quiz = tmp_path / "quiz.jsonl"
    rows = [{"prompt": a * 3, "choices": [a, b], "answer": 0} for a, b in zip("abcdef", "bcdefg", strict=True)]
    quiz.write_text("\n".join(map(json.dumps, rows)))
    asked = quick | {"data__search_dataset": str(quiz), "objective": "task"}
    with pytest.raises(WrongInput, match="questions have no perplexity"):
        prunekit.tune(**asked, space=SPACE, trials=2)
    tuned = prunekit.tune(**asked, space=SPACE, trials=2, metric="objective")
    assert all(math.isfinite(row.values["objective"]) for row in tuned.rows)
    result = prunekit.prune(recipe=tuned.best, quiet=True)
    assert result.report["losses"]["objective"] == pytest.approx(tuned.front[0].values["objective"])


def test_sqlite_holds_the_study_too(quick, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    there: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/studies.db", "study_name": "mine"}
    tuned = prunekit.tune(**quick, space=SPACE, trials=1, **there)
    assert not (quick["output"] / "study.log").exists()
    assert points(prunekit.tune(**quick, space=SPACE, trials=1, **there)) == points(tuned)
    with pytest.raises(WrongInput, match="holds another study called 'mine'"):
        prunekit.tune(**quick | {"output": tmp_path / "other", "sparsity": 0.3}, space=SPACE, trials=2, **there)


def test_a_database_in_the_folder_of_the_study_stays_with_its_other_studies(quick, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy")
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{quick['output']}/studies.db"
    tuned = prunekit.tune(**quick, space=SPACE, trials=1, storage=storage, study_name="mine")
    optuna.create_study(storage=storage, study_name="theirs")
    again: dict[str, Any] = {"space": SPACE, "trials": 1, "damping": 0.5, "overwrite": True}
    other = prunekit.tune(**quick | again, storage=storage, study_name="mine")
    assert set(optuna.get_all_study_names(storage)) == {"mine", "theirs"}
    assert points(other) != points(tuned)
    with pytest.raises(WrongInput, match=r"study holds studies\.db, which prunekit has not made; move it"):
        prunekit.tune(**quick | again | {"damping": 0.2})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metric": "speed"}, "no metric 'speed'; there are perplexity, loss"),
        ({"metric": ["loss", "loss"]}, "each metric once"),
        ({"sampler": "dice"}, "no sampler 'dice'; there are tpe, nsga-ii, nsga-iii"),
        ({"trials": 0}, "trials are counted from 1"),
        ({"metric": "objective", "space": {"objective": ["divergence", "perplexity"]}}, "where the objective is tuned"),
        ({"space": {"pruner": ["obz", "obs"]}}, "no pruner 'obz'"),
        ({"space": "gone.yaml"}, "no space file 'gone.yaml'"),
        ({"storage": "nonsense"}, "the storage 'nonsense' cannot be opened"),
        ({"storage": "none://me:secret@host/db?key=secret"}, "the storage 'none://host/db' cannot be opened"),
        ({"objective": "robust"}, "there is only noise"),
        ({"model": None}, "no model was given"),
    ],
    ids=str,
)
def test_wrong_input_is_one_sentence(quick, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(WrongInput, match=sentence):
        prunekit.tune(**{"space": SPACE, "trials": 1} | quick | changes)


def test_another_study_does_not_go_on_in_the_folder(quick, tmp_path: Path) -> None:
    prunekit.tune(**quick, space=SPACE, trials=1)
    with pytest.raises(WrongInput, match=r"holds a study \(another damping\)"):
        prunekit.tune(**quick, space=SPACE, trials=1, damping=0.5)
    (quick["output"] / "thesis.tex").touch()
    with pytest.raises(WrongInput, match=r"study holds thesis\.tex, which prunekit has not made"):
        prunekit.tune(**quick, space=SPACE, trials=1, damping=0.5, overwrite=True)
    (quick["output"] / "thesis.tex").unlink()
    prunekit.tune(**quick, space=SPACE, trials=1, damping=0.5, overwrite=True)  # all else is known to be a study's
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(WrongInput, match="holds other files"):
        prunekit.tune(**quick | {"output": tmp_path / "full"}, space=SPACE, trials=1, overwrite=True)


def test_the_command_line_shows_the_table(model: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "space.yaml").write_text("pruner: [wanda, {name: obs, aim: [own, dense]}]\nrebuild: false\n")
    words = f"""tune {model} -o {tmp_path}/study --recipe fast --space {tmp_path}/space.yaml --trials 3 --dataset {text}
        --set data.calibration_tokens=128 --set data.search_tokens=128 --set data.evaluation_tokens=64
        --set data.seqlen=16 --metric perplexity,seconds --quiet"""
    done = CliRunner().invoke(cli.app, words.split())
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["recipe", "perplexity", "seconds", "differs", "in"]
    assert any(line.startswith("base") for line in lines)
    assert f"the best: prunekit prune --recipe {tmp_path}/study/best.yaml --output DIR" in lines
    assert f"all trials: optuna-dashboard {tmp_path}/study/study.log" in lines
    refused = CliRunner().invoke(cli.app, ["tune", str(model), "--space", "default"])
    assert (refused.exit_code, refused.stderr.strip()) == (
        2,
        "error: no --output was given; name a new folder for the study",
    )
