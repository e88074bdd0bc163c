"""A recipe is plain data: it is read, written and read again, and wrong files are one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prunekit.errors import WrongInput
from prunekit.recipe.presets import presets
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.space.prices import Prices

MINIMAL = {"pruner": "wanda", "allocator": "uniform", "objective": "expected-error"}


@pytest.mark.parametrize("name", sorted(presets()))
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    said = Recipe.load(name).with_overrides({"model": "some/model", "seed": 3, "data.digests": {"search": "00"}})
    written = resolve(said)
    file.write_text(written.recipe.to_yaml())
    read = Recipe.load(file)
    assert read == resolve(read).recipe == written.recipe
    assert read.to_yaml() == written.recipe.to_yaml()
    assert resolve(read).digest == written.digest
    file.write_text(said.to_yaml())
    assert Recipe.load(file) == said


def test_yaml_has_every_option_and_the_versions(recipe: Recipe) -> None:
    text = resolve(recipe).recipe.to_yaml()
    assert text.startswith("# prunekit ")
    unsaid = (
        "family",
        "spare",
        "multiple_of",
        "learner",
        "learned",
        "width",
        "experts",
        "experts_share",
    )  # it has none
    assert list(yaml.safe_load(text)) == [name for name in Recipe.model_fields if name not in unsaid]
    assert yaml.safe_load(text)["pruner"].keys() > {"name"}


def test_a_file_says_what_differs_from_the_default(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("sparsity: 0.3\ndata: {seqlen: 64}\n")
    assert Recipe.load(file) == recipe.with_overrides({"sparsity": 0.3, "data.seqlen": 64})


def test_a_time_takes_the_place_of_the_amounts_that_a_preset_proposes(tmp_path: Path) -> None:
    fast, said = Recipe.load("fast"), {"data.calibration_tokens": 2_048}
    assert fast.data.calibration_tokens == fast.data.evaluation_tokens == 16_384
    free = fast.with_overrides({"seed": 1}).with_overrides({"time": "15m"})
    assert free.data.calibration_tokens is free.data.evaluation_tokens is None
    for kept in (fast.with_overrides(said | {"time": 90}), fast.with_overrides(said).with_overrides({"time": 90})):
        assert (kept.data.calibration_tokens, kept.data.evaluation_tokens) == (2_048, None)
    assert fast.with_overrides({"seed": 1}).data == fast.with_overrides({"time": None}).data == fast.data
    assert Recipe.load("tyr").with_overrides({"time": "1h"}).data == Recipe.load("tyr").data, "its search needs them"
    (tmp_path / "mine.yaml").write_text("data: {calibration_tokens: 16_384}\n")  # a file's are the caller's own
    assert Recipe.load(tmp_path / "mine.yaml").with_overrides({"time": 90}).data.calibration_tokens == 16_384


def test_the_folder_of_a_pruned_model_is_a_recipe(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path) == recipe


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("defualt", "no recipe 'defualt'; did you mean 'default'?"),
        ("gone.yaml", "no recipe file 'gone.yaml'"),
        ("some/where", "no recipe file 'some/where'"),
    ],
)
def test_no_such_recipe_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(WrongInput) as caught:
        Recipe.load(name)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sparsity: [", "line 1 is not YAML"),
        ("- sparsity", "is not a list of key: value"),
        ("sparsty: 0.3", "did you mean 'sparsity'?"),
    ],
)
def test_a_broken_recipe_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(WrongInput) as caught:
        Recipe.load(tmp_path / "broken.yaml")
    assert sentence in str(caught.value)


def test_a_price_table_lies_beside_the_recipe(tmp_path: Path, table: Prices) -> None:
    timed = resolve(Recipe.load().with_overrides({"target": "latency=0.6", "latency.prices": table.as_dict()}))
    (tmp_path / "recipe.yaml").write_text(timed.recipe.to_yaml())
    assert "prices: prices.json" in timed.recipe.to_yaml()
    with pytest.raises(WrongInput, match=r"no price table .*prices\.json"):
        resolve(Recipe.load(tmp_path))
    (tmp_path / "prices.json").write_text(json.dumps(table.as_dict()))
    for name in (tmp_path, tmp_path / "recipe.yaml"):
        found = resolve(Recipe.load(name))
        assert found.recipe.latency.prices == json.loads(json.dumps(table.as_dict()))
        assert found.recipe == timed.recipe
        assert found.digest == timed.digest


def test_a_wrong_latency_key_is_met_with_the_nearest() -> None:
    with pytest.raises(WrongInput, match=r"no recipe key 'latency\.promt'; did you mean 'latency\.prompt'"):
        Recipe.of_mapping(MINIMAL | {"latency": {"promt": 8}})
    with pytest.raises(WrongInput, match=r"latency\.batch"):
        Recipe.load().with_overrides({"latency.batch": 0})


def test_a_recipe_is_read_and_changed_without_a_plugin_or_a_tensor(tmp_path: Path) -> None:
    code = """
import sys
from prunekit.recipe.schema import Recipe
recipe = Recipe.load("fast").with_overrides({"pruner.aim": "own", "allocator": "tyr", "allocator.inner.generations": 3})
several = recipe.spread({"sparsity": [0.2, 0.4], "finishers": "bias", "finishers.bias.inputs": "pruned"})
assert several.members[1].to_yaml().count("name: bias")
heavy = ("torch", "transformers", "numpy", "prunekit_strategies.pruners", "prunekit.plugins.registry")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
