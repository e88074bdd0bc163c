import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from prunekit.data.spec import DataSpec
from prunekit.errors import WrongInput
from prunekit.plugins.pruner import LocalPruner
from prunekit.plugins.registry import EXPORTERS, FINISHERS, METRICS, PRUNERS, Entry
from prunekit.recipe import schema as module
from prunekit.recipe.overrides import parsed
from prunekit.recipe.presets import presets
from prunekit.recipe.schema import Recipe
from prunekit.space.prices import Prices
from prunekit.testing.spaces import sites_of, timed

MINIMAL = {"pruner": "wanda", "allocator": "uniform", "objective": "expected-error"}


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load()


# -- reading and writing ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_names_parts_that_exist(name: str) -> None:
    assert Recipe.load(name).checked().pruner["name"]


@pytest.mark.parametrize("name", sorted(presets()))
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    written = Recipe.load(name).with_overrides({"model": "some/model", "seed": 3, "data.digests": {"search": "00"}})
    file.write_text(written.to_yaml())
    read = Recipe.load(file)
    assert read == read.checked() == written.checked()
    assert read.to_yaml() == written.to_yaml()
    assert read.digest == written.digest


def test_yaml_has_every_option_and_the_versions(recipe: Recipe) -> None:
    text = recipe.to_yaml()
    assert text.startswith("# prunekit ")
    assert list(yaml.safe_load(text)) == [name for name in Recipe.model_fields if name != "family"]  # it has none
    assert yaml.safe_load(text)["pruner"].keys() > {"name"}


def test_a_file_says_what_differs_from_the_default(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("sparsity: 0.3\ndata: {seqlen: 64}\n")
    assert Recipe.load(file) == recipe.with_overrides({"sparsity": 0.3, "data.seqlen": 64})


def test_the_folder_of_a_pruned_model_is_a_recipe(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path) == recipe.checked()


def test_the_digest_is_of_what_makes_the_weights(recipe: Recipe) -> None:
    same = recipe.with_overrides({"device": "cuda", "verify": False, "code": "bundled"})
    other = recipe.with_overrides({"damping": 0.02})
    assert recipe.digest == recipe.checked().digest == same.digest != other.digest


# -- overriding ---------------------------------------------------------------------------------------


def test_a_flag_replaces_a_plugin_and_a_path_sets_its_option(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"pruner.refit": True, "pruner": "magnitude"})
    assert changed.checked().pruner["name"] == "magnitude"
    assert changed.pruner["refit"] is True


def test_options_of_a_plugin_inside_a_plugin(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"allocator": "tyr", "allocator.inner.generations": 5, "allocator.reach": 2})
    assert changed.allocator["inner"]["generations"] == 5
    assert changed.checked().allocator["reach"] == 2


def test_another_plugin_inside_a_plugin(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"allocator": "tyr", "allocator.inner": "uniform"})
    assert changed.checked().allocator["inner"] == {"name": "uniform", "equal": False}


def test_naming_the_plugin_that_is_there_keeps_its_options(recipe: Recipe) -> None:
    set_ = recipe.with_overrides({"pruner": "obs", "pruner.aim": "dense"})
    assert set_.with_overrides({"pruner": "obs"}).pruner["aim"] == "dense"


def test_a_plugin_object_is_as_good_as_its_name(recipe: Recipe) -> None:
    from prunekit.plugins.registry import PRUNERS

    changed = recipe.with_overrides({"pruner": PRUNERS.build({"name": "obs", "aim": "dense"})})
    assert changed.pruner.items() >= {"name": "obs", "aim": "dense"}.items()


def test_data_given_as_a_mapping_are_merged(recipe: Recipe) -> None:
    changed = recipe.with_overrides({"data.field": "body"}).with_overrides({"data": {"seqlen": 64}})
    assert (changed.data.field, changed.data.seqlen) == ("body", 64)


@pytest.mark.parametrize("key", ["data.seqlen", "model", "seed"])
def test_digests_go_with_the_data_they_are_of(recipe: Recipe, key: str) -> None:
    drawn = recipe.model_copy(update={"data": DataSpec(digests={"calibration": "00"})})
    assert drawn.with_overrides({"sparsity": 0.3}).data.digests is not None
    assert drawn.with_overrides({key: "7"}).data.digests is None


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


def test_set_takes_yaml_values() -> None:
    assert parsed("pruner.damping=0.1") == ("pruner.damping", 0.1)
    assert parsed("data.shuffle=true") == ("data.shuffle", True)
    assert parsed("allocator.inner.selections=[[1, 512]]")[1] == [[1, 512]]
    assert parsed("data.dataset=a=b.txt") == ("data.dataset", "a=b.txt")


# -- structures -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"structure": "2:4", "sparsity": 0.6}, "structure 2:4 removes 0.5 of the weights"),
        ({"structure": "2:4", "of": "model"}, "leave sparsity and of away"),
        ({"structure": "weights", "apart": True}, "it goes with structure groups"),
        ({"structure": "weights", "allocator": "block-influence"}, "signal 'influence' is of whole sub-layers"),
        (
            {"structure": "weights", "finishers": ["lora"]},
            "finisher 'lora' does not know structure weights",
        ),
    ],
)
def test_what_does_not_go_with_single_weights_is_one_sentence(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, object], sentence: str
) -> None:
    point = EntryPoint("keep-largest", "prunekit.testing.supernets:KeepLargest", "prunekit.pruners")
    monkeypatch.setitem(PRUNERS._entries, "keep-largest", Entry("pruner", "keep-largest", "prunekit", point))
    with pytest.raises(WrongInput) as caught:
        recipe.with_overrides({"pruner": "keep-largest"} | overrides).checked()
    assert sentence in str(caught.value)


# -- wrong input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"sparsty": 0.5}, "no recipe key 'sparsty'; did you mean 'sparsity'?"),
        ({"data.seqln": 8}, "no recipe key 'data.seqln'; did you mean 'data.seqlen'?"),
        ({"data.seqlen.more": 8}, "no recipe key 'seqlen.more'"),
        ({"data": {"seqln": 8}}, "no recipe key 'data.seqln'; did you mean 'data.seqlen'?"),
        ({"data": 3}, "data: "),
        ({"pruner": "obz"}, "no pruner 'obz'; did you mean 'obs'? there are "),
        ({"pruner": ["obs"]}, "pruner: "),
        ({"pruner": {"aim": "dense"}}, "a pruner is given by its name"),
        (
            {"pruner": {"name": "obs", "aime": "dense"}},
            "no option of pruner 'obs' 'aime'; did you mean 'aim'?",
        ),
        ({"pruner.aime": "dense"}, "no recipe key 'pruner.aime'; did you mean 'pruner.aim'?"),
        ({"allocator.inner": "evolutoin"}, "no allocator 'evolutoin'; did you mean 'evolution'?"),
        ({"finishers": ["polish"]}, "no finisher 'polish'"),
        ({"sparsity": 0}, "sparsity is the share that is removed, more than 0 and less than 1, not 0"),
        ({"sparsity": 1.0}, "more than 0 and less than 1, not 1.0"),
        ({"sparsity": -0.5}, "more than 0 and less than 1, not -0.5"),
        ({"sparsity": "half"}, "sparsity: input should be a valid number"),
        (
            {"structure": "rows"},
            "no structure 'rows'; there are groups, weights, and patterns N:M that",
        ),
        ({"structure": "4:2"}, "no structure '4:2'; there are groups, weights, and patterns N:M"),
        ({"structure": "weights"}, "pruner 'obs' does not know structure weights; it knows groups"),
        ({"structure": "2:4"}, "pruner 'obs' does not know structure n:m; it knows groups"),
        ({"carry": "dens"}, "carry is one of 'dense', 'centre' or 'expected', not 'dens'"),
        ({"metric": "joules"}, "no metric 'joules'; there are bytes, flops, kv-cache, latency, parameters"),
        ({"metric": {"name": "bytes", "per": 1}}, "no option of metric 'bytes' 'per'; there are per_parameter"),
        ({"metric.attention": 2}, "no recipe key 'metric.attention'"),
        ({"exporters": ["hff"]}, "no exporter 'hff'; did you mean 'hf'"),
        ({"exporters": ["hf", "hf"]}, "two exporters write the result itself"),
        ({"data.calibration_tokens": 0}, "data.calibration_tokens: input should be greater than 0, not 0"),
        ({"data.dataset": "gone.txt"}, "no file 'gone.txt'"),
        ({"data.evaluation_dataset": "gone.jsonl"}, "no file 'gone.jsonl'"),
        ({"data.dataset": "wikitext-2"}, "did you mean 'wikitext2'?"),
        ({"version": 2}, "version is one of 1, not 2"),
        (
            {"data.dataset": [{"dataset": "c4", "wieght": 2}]},
            "no recipe key 'data.dataset.0.wieght'; did you mean 'data.dataset.0.weight'?",
        ),
        ({"data.dataset": ["c4", {"dataset": "wikitext2", "weight": 0}]}, "data.dataset.1.weight: input should be"),
        ({"data.dataset": []}, "data.dataset: "),
        ({"data.dataset": ["c4", "gone.txt"]}, "no file 'gone.txt'"),
    ],
)
def test_wrong_values_are_one_sentence(recipe: Recipe, overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(WrongInput) as caught:
        recipe.with_overrides(overrides).checked()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_are_asked_of_pruners_that_have_them(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = recipe.with_overrides({"allocator": "global-rank"})
    ranked.checked()
    monkeypatch.setattr(type(PRUNERS.build("obs")), "scores", LocalPruner.scores)
    with pytest.raises(WrongInput, match="'global-rank' ranks groups by the pruner's scores, and pruner 'obs'"):
        ranked.checked()


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


@pytest.mark.parametrize("assignment", ["sparsity", "=0.5", "sparsity=[", ""])
def test_a_broken_assignment_is_one_sentence(assignment: str) -> None:
    with pytest.raises(WrongInput, match="--set"):
        parsed(assignment)


def test_two_presets_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("one_pkg", "two_pkg"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "same.yaml").write_text("sparsity: 0.5")
    monkeypatch.syspath_prepend(tmp_path)

    class Point:
        def __init__(self, value: str) -> None:
            self.name = self.value = value

    monkeypatch.setattr(module.metadata, "entry_points", lambda group: [Point("one_pkg"), Point("two_pkg")])
    with pytest.raises(WrongInput, match="two presets are called 'same'"):
        presets.__wrapped__()


def test_finishers_are_a_list_one_of_them_or_plugins_and_have_options_by_name(recipe: Recipe) -> None:
    alone = recipe.with_overrides({"finishers": "bias"})
    assert alone.finishers == ({"name": "bias"},)
    plugin = FINISHERS.build({"name": "bias", "inputs": "pruned"})
    both = alone.with_overrides({"finishers": ["least-squares", plugin], "finishers.least-squares.damping": 0.5})
    assert [spec["name"] for spec in both.finishers] == ["least-squares", "bias"]
    assert both.finishers[0]["damping"] == 0.5
    assert both.finishers[1]["inputs"] == "pruned"
    assert both.with_overrides({"finishers": []}).finishers == ()
    assert Recipe.of_mapping(recipe.model_dump() | {"finishers": "bias"}) == alone


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"finishers.bias.inputs": "dense"}, "no finisher of this recipe 'bias'; there are none"),
        ({"finishers": "bias", "finishers.bias.input": 1}, "no recipe key 'bias.input'; did you mean 'bias.inputs'"),
        ({"finishers": ["biass"]}, "no finisher 'biass'; did you mean 'bias'"),
    ],
    ids=["absent", "option", "name"],
)
def test_wrong_finishers_are_one_sentence(recipe: Recipe, overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(WrongInput, match=re.escape(sentence)):
        recipe.with_overrides(overrides).checked()


# -- targets and the price table ------------------------------------------------------------------------


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
        ("latency", "more than 0 and less than 1, not ''"),
        ("latancy=0.6", "no metric 'latancy'; did you mean 'latency'"),
        ({"latency": 0.6, "flops": 0.5}, "one METRIC=SHARE"),
    ],
)
def test_what_is_no_target_is_refused(target: object, says: str) -> None:
    with pytest.raises(WrongInput, match=says):
        Recipe.load().with_overrides({"target": target})


@pytest.mark.parametrize("beside", [{"sparsity": 0.4}, {"metric": "flops"}])
def test_a_target_stands_alone(beside: dict[str, object]) -> None:
    with pytest.raises(WrongInput, match=rf"so {next(iter(beside))} cannot be given too; --sparsity 0\.4 is the same"):
        Recipe.load().with_overrides({"target": "parameters=0.6"} | beside)
    with pytest.raises(WrongInput, match="cannot be given too"):
        Recipe.of_mapping(MINIMAL | {"target": "parameters=0.6"} | beside)


def test_a_metric_has_options_and_a_bare_name_where_they_are_the_defaults(recipe: Recipe) -> None:
    for overrides in (
        {"metric": {"name": "bytes", "per_parameter": 1}},
        {"metric": "bytes", "metric.per_parameter": 1},
    ):
        narrow = recipe.with_overrides(overrides).checked()
        assert narrow.metric == {"name": "bytes", "per_parameter": 1}
        assert narrow.metric_spec == narrow.metric
    assert recipe.with_overrides({"metric": METRICS.build("bytes")}).checked().metric == "bytes"
    assert narrow.with_overrides({"metric": "flops"}).checked().metric == "flops"
    assert narrow.digest != recipe.with_overrides({"metric": "bytes"}).digest


def test_the_options_of_latency_have_a_section(recipe: Recipe) -> None:
    for overrides in (
        {"metric": {"name": "latency", "batch": 2}},
        {"metric": "latency", "latency.batch": 2},
        {"metric": "latency", "metric.batch": 2},
    ):
        found = recipe.with_overrides(overrides).checked()
        assert (found.metric, found.latency.batch) == ("latency", 2)
        assert found.metric_spec == {"name": "latency", "batch": 2, "prompt": None, "new_tokens": 0, "prices": None}


def test_a_result_is_always_a_folder_that_loads(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("table", "prunekit_corner:Table", "prunekit.exporters")
    monkeypatch.setitem(EXPORTERS._entries, "table", Entry("exporter", "table", "corner", point))
    assert recipe.checked().exporters == ({"name": "hf"},)
    for asked in ("table", ["hf", "table"], EXPORTERS.build("table")):
        assert recipe.with_overrides({"exporters": asked}).checked().exporters == ({"name": "hf"}, {"name": "table"})
    with pytest.raises(WrongInput, match=r"two exporters write tensors\.csv"):
        recipe.with_overrides({"exporters": ["table", "table"]}).checked()
    assert recipe.with_overrides({"exporters": "table"}).digest == recipe.digest  # the weights are the same


def test_zeros_save_no_time() -> None:
    with pytest.raises(WrongInput, match="latency goes with structure groups"):
        Recipe.load().with_overrides({"target": "latency=0.6", "structure": "weights", "pruner": "sparsegpt"}).checked()


@pytest.fixture
def table() -> Prices:
    return timed(sites_of(2, attention=(4, 10), mlp=(16, 3)))


def test_a_price_table_lies_beside_the_recipe(tmp_path: Path, table: Prices) -> None:
    timed_recipe = Recipe.load().with_overrides({"target": "latency=0.6", "latency.prices": table.as_dict()})
    (tmp_path / "recipe.yaml").write_text(timed_recipe.to_yaml())
    assert "prices: prices.json" in timed_recipe.to_yaml()
    with pytest.raises(WrongInput, match=r"no price table .*prices\.json"):
        Recipe.load(tmp_path).checked()
    (tmp_path / "prices.json").write_text(json.dumps(table.as_dict()))
    for name in (tmp_path, tmp_path / "recipe.yaml"):
        found = Recipe.load(name).checked()
        assert METRICS.build(found.metric_spec) == METRICS.build({"name": "latency", "prices": table.as_dict()})
        assert found == timed_recipe.checked()
        assert found.digest == timed_recipe.digest


def test_a_price_table_goes_with_its_model_workload_and_device(table: Prices) -> None:
    recipe = Recipe.load().with_overrides(
        {"model": "a", "target": "latency=0.6", "latency.prices": table.as_dict(), "latency.prompt": 8}
    )
    for stays in ({"model": "a"}, {"target": "latency=0.7"}, {"pruner": "wanda"}, {"latency.prompt": 8}):
        assert recipe.with_overrides(stays).latency.prices == table.as_dict()
    for key, value in {"model": "b", "latency.batch": 2, "device": "cuda", "heads": "query", "latency": {}}.items():
        assert recipe.with_overrides({key: value}).latency.prices is None
    with pytest.raises(WrongInput, match=r"of batch 1, and latency\.batch is 2"):
        recipe.with_overrides({"latency": {"batch": 2, "prices": table.as_dict()}}).checked()


def test_the_workload_has_no_say_where_nothing_is_timed() -> None:
    plain = Recipe.load()
    assert plain.with_overrides({"latency.prompt": 8}).digest == plain.digest
    timed_recipe = plain.with_overrides({"target": "latency=0.5"})
    assert timed_recipe.digest != timed_recipe.with_overrides({"latency.prompt": 8}).digest


def test_a_wrong_latency_key_is_met_with_the_nearest() -> None:
    with pytest.raises(WrongInput, match=r"no recipe key 'latency\.promt'; did you mean 'latency\.prompt'"):
        Recipe.of_mapping(MINIMAL | {"latency": {"promt": 8}})
    with pytest.raises(WrongInput, match=r"latency\.batch"):
        Recipe.load().with_overrides({"latency.batch": 0})
