"""What is said beside a recipe replaces values, and what belonged to the old ones goes with them."""

from pathlib import Path

import pytest

from prunekit.data.spec import DataSpec
from prunekit.errors import WrongInput
from prunekit.recipe.overrides import parsed
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.space.prices import Prices

MINIMAL = {"pruner": "wanda", "allocator": "uniform", "objective": "expected-error"}


def test_a_flag_replaces_a_plugin_and_a_path_sets_its_option(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"pruner.refit": True, "pruner": "magnitude"})
    assert changed.pruner == {"name": "magnitude", "refit": True}


def test_options_of_a_plugin_inside_a_plugin(recipe: Recipe) -> None:
    for now in ("tyr", {"name": "tyr"}, {"name": "tyr", "inner": "evolution"}):
        changed = recipe.with_overrides({"allocator": now, "allocator.inner.generations": 5, "allocator.reach": 2})
        complete = resolve(changed).recipe.allocator
        assert complete is not None
        assert (complete["inner"]["name"], complete["inner"]["generations"], complete["reach"]) == ("evolution", 5, 2)


def test_another_plugin_inside_a_plugin(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"allocator": "tyr", "allocator.inner": "uniform"})
    assert (resolve(changed).recipe.allocator or {})["inner"] == {"name": "uniform", "equal": False}


def test_naming_the_plugin_that_is_there_keeps_its_options(recipe: Recipe) -> None:
    set_ = recipe.with_overrides({"pruner": "obs", "pruner.aim": "dense"})
    assert set_.with_overrides({"pruner": "obs"}).pruner["aim"] == "dense"


def test_data_given_as_a_mapping_are_merged(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"data.field": "body"}).with_overrides({"data": {"seqlen": 64}})
    assert (changed.data.field, changed.data.seqlen) == ("body", 64)


@pytest.mark.parametrize("key", ["data.seqlen", "model", "seed"])
def test_digests_go_with_the_data_they_are_of(recipe: Recipe, key: str) -> None:
    drawn = recipe.model_copy(update={"data": DataSpec(digests={"calibration": "00"})})
    assert drawn.with_overrides({"sparsity": 0.3}).data.digests is not None
    assert drawn.with_overrides({key: "7"}).data.digests is None


def test_another_model_begins_its_windows_its_own_way(recipe: Recipe) -> None:
    found = recipe.model_copy(update={"data": DataSpec(window_start="bos", digests={"calibration": "00"})})
    assert found.with_overrides({"sparsity": 0.3}).data.window_start == "bos"
    assert found.with_overrides({"model": "other"}).data.window_start == "auto"
    assert found.with_overrides({"model": "other", "data.window_start": "none"}).data.window_start == "none"
    said = recipe.with_overrides({"data.window_start": "none"})  # by whom wrote the recipe, of any model
    assert said.with_overrides({"model": "other"}).data.window_start == "none"


def test_another_data_set_has_its_own_splits(recipe: Recipe) -> None:
    drawn = DataSpec(dataset="c4", config="en", split="train", evaluation_dataset="c4", evaluation_split="validation")
    changed = recipe.model_copy(update={"data": drawn}).with_overrides({"data.dataset": "python-docs"})
    assert changed.data == DataSpec(dataset="python-docs")
    elsewhere = drawn.model_copy(update={"evaluation_dataset": "wikitext2", "evaluation_split": "test"})
    changed = recipe.model_copy(update={"data": elsewhere}).with_overrides({"data.dataset": "python-docs"})
    assert changed.data.evaluation_dataset == "wikitext2"


def test_several_data_sets_are_a_list_of_names_and_mappings(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"data.dataset": ["c4", {"dataset": "wikitext2", "weight": 3}]})
    assert [(text.dataset, text.weight) for text in changed.data.texts("dataset")] == [("c4", 1), ("wikitext2", 3)]
    assert changed.with_overrides({"data.dataset": ["c4"]}).data.dataset == "c4"
    drawn = changed.with_overrides({"data.evaluation_dataset": ["c4", "wikitext2"], "data.search_dataset": "c4"})
    assert drawn.with_overrides({"data.dataset": "python-docs"}).data.evaluation_dataset is None
    assert drawn.data.names == ["c4", "wikitext2", "c4", "c4", "wikitext2"]


def test_another_sparsity_is_of_no_family(recipe: Recipe) -> None:
    (first, *_) = (recipe.spread({"sparsity": [0.3, 0.5]}) or recipe).members
    assert first.family == (0.3, 0.5)
    assert first.with_overrides({"seed": 1}).family == (0.3, 0.5)
    assert first.with_overrides({"sparsity": 0.4}).family == ()


def test_set_takes_yaml_values() -> None:
    assert parsed("pruner.damping=0.1") == ("pruner.damping", 0.1)
    assert parsed("data.shuffle=true") == ("data.shuffle", True)
    assert parsed("allocator.inner.selections=[[1, 512]]")[1] == [[1, 512]]
    assert parsed("data.dataset=a=b.txt") == ("data.dataset", "a=b.txt")


@pytest.mark.parametrize(
    ("text", "structure", "sparsity"), [("2:4", "2:4", 0.5), ("'1:4'", "1:4", 0.75), ("4:16", "4:16", 0.75)]
)
def test_a_pattern_says_the_sparsity_with_or_without_quotes(
    tmp_path: Path, text: str, structure: str, sparsity: float
) -> None:
    (tmp_path / "my.yaml").write_text(f"structure: {text}\n")
    recipe = Recipe.load(tmp_path / "my.yaml")
    assert (recipe.structure, recipe.sparsity) == (structure, sparsity)
    key, value = parsed(f"structure={text}")
    recipe = Recipe.load().with_overrides({key: value})
    assert (recipe.structure, recipe.sparsity) == (structure, sparsity)
    assert recipe.with_overrides({"seed": 1}).sparsity == sparsity
    assert recipe.with_overrides({"structure": "weights"}).sparsity == 0.5
    assert recipe.with_overrides({"structure": "weights", "sparsity": 0.7}).sparsity == 0.7


@pytest.mark.parametrize("assignment", ["sparsity", "=0.5", "sparsity=[", ""])
def test_a_broken_assignment_is_one_sentence(assignment: str) -> None:
    with pytest.raises(WrongInput, match="--set"):
        parsed(assignment)


def test_finishers_are_a_list_or_one_of_them_and_have_options_by_name(recipe: Recipe) -> None:
    alone = recipe.with_overrides({"finishers": "bias"})
    assert alone.finishers == ({"name": "bias"},)
    bias = {"name": "bias", "inputs": "pruned"}
    both = alone.with_overrides({"finishers": ["least-squares", bias], "finishers.least-squares.damping": 0.5})
    assert [spec["name"] for spec in both.finishers] == ["least-squares", "bias"]
    assert both.finishers[0]["damping"] == 0.5
    assert both.finishers[1]["inputs"] == "pruned"
    assert both.with_overrides({"finishers": []}).finishers == ()
    assert Recipe.of_mapping(recipe.model_dump() | {"finishers": "bias"}) == alone


@pytest.mark.parametrize("target", ["latency=0.6", {"latency": 0.6}, {"latency": "3/5"}])
def test_a_target_is_short_for_metric_and_sparsity(target: object) -> None:
    for recipe in (Recipe.load().with_overrides({"target": target}), Recipe.of_mapping(MINIMAL | {"target": target})):
        assert (recipe.metric, recipe.sparsity) == ("latency", 0.4)
    same = Recipe.load().with_overrides({"sparsity": 0.4})
    assert Recipe.load().with_overrides({"target": "parameters=0.6"}) == same


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("latency=0", "more than 0 and less than 1, not '0'"),
        ("latency=1", "more than 0 and less than 1"),
        ("latency=1.2", "more than 0 and less than 1"),
        ("latency=half", "more than 0 and less than 1, not 'half'"),
        ("latency", "a target is one METRIC=SHARE, as in latency=0.6, not 'latency'"),
        ("latancy=0.6", "no metric 'latancy'; did you mean 'latency'"),
        ({"latency": 0.6, "flops": 0.5}, "one METRIC=SHARE"),
    ],
)
def test_what_is_no_target_is_refused(target: object, says: str) -> None:
    with pytest.raises(WrongInput, match=says):
        resolve(Recipe.load().with_overrides({"target": target}))


@pytest.mark.parametrize("beside", [{"sparsity": 0.4}, {"metric": "flops"}])
def test_a_target_stands_alone(beside: dict[str, object]) -> None:
    with pytest.raises(WrongInput, match=rf"so {next(iter(beside))} cannot be given too; --sparsity 0\.4 is the same"):
        Recipe.load().with_overrides({"target": "parameters=0.6"} | beside)
    with pytest.raises(WrongInput, match="cannot be given too"):
        Recipe.of_mapping(MINIMAL | {"target": "parameters=0.6"} | beside)


def test_a_price_table_goes_with_its_model_workload_and_device(table: Prices) -> None:
    recipe = Recipe.load().with_overrides(
        {"model": "a", "target": "latency=0.6", "latency.prices": table.as_dict(), "latency.prompt": 8}
    )
    for stays in ({"model": "a"}, {"target": "latency=0.7"}, {"pruner": "wanda"}, {"latency.prompt": 8}):
        assert recipe.with_overrides(stays).latency.prices == table.as_dict()
    for key, value in {"model": "b", "latency.batch": 2, "device": "cuda", "heads": "query", "latency": {}}.items():
        assert recipe.with_overrides({key: value}).latency.prices is None
    with pytest.raises(WrongInput, match=r"of batch 1, and latency\.batch is 2"):
        resolve(recipe.with_overrides({"latency": {"batch": 2, "prices": table.as_dict()}}))
