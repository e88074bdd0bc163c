"""State space models by name: pruned, verified, and loaded again by transformers alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import prunekit
from prunekit import WrongInput
from prunekit.cli.main import app
from prunekit.data.spec import DataSpec
from prunekit.demo import MODEL
from prunekit.measure.evaluate import evaluate
from prunekit.search.ledger import Ledger
from prunekit.testing import tiny

Fixture = Callable[..., Any]
FAMILIES = ["mamba", "mamba2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, numbers: Fixture) -> dict[str, Path]:
    """A tiny model of each family with a tokenizer and a text."""
    found = {}
    for family in FAMILIES:
        found[family] = path = tmp_path_factory.mktemp(family) / "model"
        tiny(family, vocab_size=2048, num_hidden_layers=2).float().save_pretrained(path)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
        (path / "text.txt").write_text(numbers(2000))
    return found


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def pruned(quick: Fixture) -> Callable[..., dict[str, Any]]:
    """The report of a run."""

    def run(folder: Path, output: Path, structure: str, **changes: Any) -> dict[str, Any]:
        few = {"data__search_tokens": 256, "data__evaluation_tokens": 256, "data__seqlen": 16, "verify": False}
        settings = {"allocator": "uniform", "data__dataset": str(folder / "text.txt"), "structure": structure}
        return prunekit.prune(folder, output=output, **quick(**settings | few | changes)).report

    return run


def test_a_run_by_name_is_a_stock_model_with_zeros(folder: Path, tmp_path: Path, linears: Fixture) -> None:
    out = tmp_path / "out"
    tokens = ["--calibration-tokens", "512", "--search-tokens", "256", "--set", "data.evaluation_tokens=256"]
    given = ["--dataset", str(folder / "text.txt"), "--seqlen", "16", *tokens, "--allocator", "uniform", "--quiet"]
    by_name = ["--structure", "weights", "--pruner", "apt", "--sparsity", "0.5", "--output", str(out)]
    # verified: a fresh process loads it, without prunekit where the class is of transformers, and compares logits
    done = CliRunner().invoke(app, ["prune", str(folder), *by_name, *given])
    assert done.exit_code == 0, done.output
    config, own = (json.loads((path / "config.json").read_text()) for path in (out, folder))
    assert {key: value for key, value in config.items() if own.get(key) != value} == {}

    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, out))
    maps = {f"backbone.layers.{name}.weight" for name in linears(folder)}
    report = json.loads((out / "report.json").read_text())
    assert {f"{site['name']}.weight" for site in report["sites"]} == maps
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (name not in maps), "only weights of linear maps change"
    for site in report["sites"]:
        weight = after[f"{site['name']}.weight"]
        assert int(weight.count_nonzero()) == site["kept"] * len(weight) == site["parameters"]
    assert report["weights"]["sparsity"] == 0.5
    assert report["pruned"]["parameters"] == report["dense"]["parameters"]
    assert "zeros are stored and multiplied like other numbers" in (out / "README.md").read_text()


@pytest.mark.parametrize("pruner", ["magnitude", "apt", {"name": "apt", "exact": 0}], ids=["magnitude", "apt", "cg"])
def test_a_pattern_is_in_every_row_of_every_map(
    folder: Path, tmp_path: Path, pruner: str | dict[str, Any], linears: Fixture, pruned: Fixture
) -> None:
    report = pruned(folder, tmp_path / "out", "2:4", pruner=pruner)
    for weight in linears(tmp_path / "out").values():
        assert bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) == 2).all())
    assert report["weights"]["patterns"] == {"2:4": len(linears(folder))}


def test_conjugate_gradients_go_where_exact_solves_go(
    folder: Path, tmp_path: Path, linears: Fixture, pruned: Fixture
) -> None:
    for name, exact in {"exact": 1024, "cg": 0}.items():
        pruned(folder, tmp_path / name, "weights", pruner={"name": "apt", "exact": exact, "steps": 300})
    one, two = linears(tmp_path / "exact"), linears(tmp_path / "cg")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["weights", "2:4"])
def test_a_search_moves_weights_between_maps_and_goes_on_after_a_kill(
    folder: Path,
    tmp_path: Path,
    structure: str,
    killed_at: Fixture,
    quick: Fixture,
    pruned: Fixture,
    content: Fixture,
) -> None:
    searched = {"pruner": "magnitude", "allocator": quick()["allocator"]}
    report = pruned(folder, tmp_path / "whole", structure, **searched)
    assert len({site["kept"] / site["groups"] for site in report["sites"]}) > 1
    assert report["budget"]["spent"] <= report["budget"]["limit"]

    with killed_at(Ledger, "answer", 5):
        pruned(folder, tmp_path / "out", structure, **searched)
    pruned(folder, tmp_path / "out", structure, **searched)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_distilled_model_keeps_its_zeros(folder: Path, tmp_path: Path, pruned: Fixture) -> None:
    more: dict[str, Any] = {"pruner": "wanda", "finishers": [{"name": "distillation", "epochs": 1, "rate": 1e-3}]}
    report = pruned(folder, tmp_path / "out", "weights", **more)
    assert report["finishers"][0]["held_out_loss"][1] <= report["finishers"][0]["held_out_loss"][0]
    assert report["weights"]["not_zero"] == report["budget"]["spent"]


@pytest.mark.parametrize("finisher", ["dsnot", "least-squares"])
def test_maps_are_polished_one_by_one(folder: Path, tmp_path: Path, finisher: str, pruned: Fixture) -> None:
    report = pruned(folder, tmp_path / "out", "weights", pruner="wanda", finishers=[finisher])
    assert report["finishers"][0]["errors"].keys() == {site["name"] for site in report["sites"]}


def test_gradient_scores_are_there_for_every_map(folder: Path, tmp_path: Path, pruned: Fixture) -> None:
    report = pruned(folder, tmp_path / "out", "weights", pruner="gradient")
    assert report["weights"]["not_zero"] == report["budget"]["spent"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"structure": "groups"}, "have no groups that can be cut out; remove single weights with structure weights"),
        ({"structure": "weights", "finishers": ["sparsellm"]}, "sparsellm works on the MLPs of a model"),
        ({"structure": "2:8"}, "has rows of .* weights, which are no whole blocks of 8"),
    ],
    ids=["groups", "finisher", "pattern"],
)
def test_what_cannot_be_done_is_said_before_any_work(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], sentence: str, pruned: Fixture
) -> None:
    with pytest.raises(WrongInput, match=sentence):
        pruned(folders["mamba"], tmp_path / "out", **{"pruner": "wanda"} | changes)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_pruned_model_is_evaluated_with_its_speed(folder: Path) -> None:
    found = evaluate(str(folder), DataSpec(dataset=str(folder / "text.txt"), seqlen=16, evaluation_tokens=256))
    assert found["decode_tokens_per_second"] > 0
    assert found["perplexity"] > 1
