"""A run's search becomes an Optuna study: a trial a question, with what was asked and what it cost."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prunekit import WrongInput
from prunekit.cli.main import app

optuna = pytest.importorskip("optuna")

from prunekit.report.storage import write_study  # noqa: E402  # needs it

SPACE = {"kind": "space", "sites": ["a", "b"], "ladders": [[0, 2, 4], [0, 8]]}
LEDGER: list[dict[str, Any]] = [
    {"kind": "choice"},
    SPACE,
    {"kind": "question", "walk": 0, "allocation": [2, 8], "tokens": 64, "loss": 0.5},
    {"kind": "question", "walk": 0, "allocation": [4, 0], "tokens": 64, "loss": 0.4, "shared": True},
    {"kind": "question", "walk": 0, "allocation": [0, 8], "tokens": 32, "loss": None, "training": 16},
]


def test_every_question_is_a_trial(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'runs.db'}"
    assert write_study(LEDGER, storage, "run") == 3
    study = optuna.load_study(study_name="run", storage=storage)
    assert [trial.params for trial in study.trials] == [{"a": 2, "b": 8}, {"a": 4, "b": 0}, {"a": 0, "b": 8}]
    assert [trial.value for trial in study.trials] == [0.5, 0.4, None]
    assert [trial.user_attrs["token_forwards"] for trial in study.trials] == [64, 64, 112]  # what is shared is free
    assert study.best_params == {"a": 4, "b": 0}
    with pytest.raises(WrongInput, match="has a study called 'run'; choose another"):
        write_study(LEDGER, storage, "run")
    with pytest.raises(WrongInput, match="asked no question"):
        write_study(LEDGER[:2], storage, "none")
    with pytest.raises(WrongInput, match="cannot be opened"):
        write_study(LEDGER, "nonsense://user:secret@x", "other")


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(WrongInput, match=r"pip install 'prunekit\[optuna\]'"):
        write_study(LEDGER, "sqlite:///x.db", "run")


def test_show_says_what_a_folder_is(tmp_path: Path) -> None:
    def said(*words: Any) -> tuple[int, str]:
        found = CliRunner().invoke(app, ["show", *map(str, words)])
        return found.exit_code, found.output

    study = tmp_path / "study"
    study.mkdir()
    row = {"name": "base", "state": "complete", "values": {"loss": 2.5}, "overrides": {}, "reason": "", "recipe": "x"}
    better = row | {"name": "0", "values": {"loss": 2.25}, "overrides": {"damping": 0.5}, "recipe": "y"}
    document = {"model": "m", "sparsity": 0.5, "metrics": ["loss"], "front": ["0"], "rows": [row, better]}
    (study / "trials.json").write_text(json.dumps(document))
    code, text = said(study)
    assert code == 0
    assert [line.split()[0] for line in text.splitlines() if line.strip()] == ["recipe", "0", "base"]
    assert "damping 0.5" in text
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "report.json").write_text("{}")
    for words, sentence in (
        ((tmp_path,), "is no result, family, study or comparison"),
        ((study, "--storage", "sqlite:///x.db"), "is an Optuna study already"),
        ((study, "--study-name", "x"), "give --storage as well"),
        ((damaged,), "cannot read (KeyError: 'model'); make it again"),
    ):
        code, text = said(*words)
        assert (code, sentence in " ".join(text.split())) == (2, True), text
