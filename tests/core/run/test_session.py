"""One opening for prune, family and tune: model, text and workers once, whatever is made of them."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
from prunekit.errors import WrongInput
from prunekit.models import opening
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run import session
from prunekit.run.session import Job, open_session
from prunekit.search.store import CandidateStore

QUICK: dict[str, Any] = {
    "recipe": "fast",
    "pruner": "magnitude",
    "allocator": "uniform",
    "data__dataset": "python-docs",
    "data__calibration_tokens": 128,
    "data__search_tokens": 128,
    "data__evaluation_tokens": 128,
    "data__seqlen": 32,
    "quiet": True,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the model was opened, text was drawn, and the engine was asked for workers."""
    counts = Counter[str]()

    def count(place: Any, name: str) -> None:
        whole = getattr(place, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return whole(*arguments, **options)

        monkeypatch.setattr(place, name, counted)

    count(session, "opened")
    count(session, "draw")
    count(type(resolve(Recipe.load()).engine), "team")
    return counts


@pytest.mark.parametrize("kind", ["prune", "family", "tune"])
def test_the_model_is_opened_once(kind: str, calls: Counter[str], saved_tiny: Callable[..., Path], tmp_path: Path):
    model, options = saved_tiny(), dict[str, Any](QUICK | {"output": tmp_path / "out"})
    if kind == "tune":
        pytest.importorskip("optuna")
        tuned = prunekit.tune(model, space={"damping": [0.01, 0.1], "rebuild": [False, True]}, trials=3, **options)
        assert {row.state for row in tuned.rows} == {"complete"}
    else:
        options |= {"sparsity": [0.2, 0.4] if kind == "family" else 0.4, "verify": False}
        prunekit.prune(model, **options)
    assert calls == {"opened": 1, "draw": 1, "team": 1}


def test_a_session_is_of_the_complete_recipe_and_tells_runs_apart(saved_tiny: Callable[..., Path]) -> None:
    few = {f"data.{part}_tokens": 128 for part in ("calibration", "search", "evaluation")}
    text = {"data.dataset": "python-docs", "data.seqlen": 32, **few}
    recipe = Recipe.load("fast").with_overrides({"model": str(saved_tiny()), **text})

    def opened(changes: dict[str, Any]) -> session.Session:
        return open_session(resolve(recipe.with_overrides(changes)), Job())

    one, same, other = opened({}), opened({"device": "cpu", "verify": False}), opened({"seed": 1})
    assert one.parts.recipe.data == one.draws.spec
    assert one.draws.spec.digests
    assert one.identify() == same.identify() != other.identify()
    assert one.identify()["weights"] == one.dense.fingerprint
    assert one.identify()["versions"].keys() >= {"prunekit", "torch", "transformers", "python"}
    assert one.with_prices(None) is one  # nothing is timed
    assert [space.cost(space.uniform()) <= space.budget.limit for space in one.make_spaces()] == [True]


def test_no_model_and_text_that_judges_nothing_are_refused(saved_tiny: Callable[..., Path]) -> None:
    with pytest.raises(WrongInput, match="no model was given"):
        prunekit.prune(**QUICK)
    with pytest.raises(WrongInput, match="there is only python-docs"):
        prunekit.prune(saved_tiny(), objective="robust", **QUICK)


def test_a_measured_dtype_is_in_the_recipe_and_an_interrupted_run_keeps_it(
    saved_tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: Callable[..., AbstractContextManager[None]],
):
    model, out = saved_tiny(torch.bfloat16, num_hidden_layers=1), tmp_path / "out"
    monkeypatch.setattr(opening, "MEASURED", 1)
    monkeypatch.setattr(opening, "times_as_fast", lambda *_: 3.0)
    with killed_at(CandidateStore, "put", 2):
        prunekit.prune(model, output=out, verify=False, **QUICK)
    monkeypatch.setattr(opening, "times_as_fast", lambda *_: 1.0)  # the machine is another one, or busy
    result = prunekit.prune(model, output=out, verify=False, **QUICK)
    assert result.recipe.dtype == "bfloat16"
    assert prunekit.prune(model, output=tmp_path / "new", verify=False, **QUICK).recipe.dtype == "float32"
    again = prunekit.prune(result.recipe.model, output=tmp_path / "again", **{**QUICK, "recipe": str(out)})
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert again.recipe == result.recipe
