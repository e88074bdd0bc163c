"""A suite says which cells there are; what is for all cells is said once."""

from itertools import product

import pytest
import yaml

from prunekit import WrongInput
from prunekit.recipe.presets import presets
from prunekit.recipe.schema import Recipe
from prunekit.recipe.suite import BASELINES, SHARED, SUITES, Suite


def cells_of(**values):
    return {cell.name: cell.recipe for cell in Suite.of_mapping(values).every_cell()}


def test_a_grid_is_every_plugin_with_every_other_and_the_baselines_are_always_there():
    found = cells_of(
        pruners=["obs", "wanda"], allocators=["table", {"name": "greedy", "steps": 4}], objectives="divergence"
    )
    grid = {f"{p} + {a} + divergence" for p, a in product(("obs", "wanda"), ("table", "greedy(steps=4)"))}
    assert set(found) == grid | set(Suite.load(BASELINES).cells)
    assert found["wanda + table + divergence"].pruner["name"] == "wanda"
    assert found["obs + greedy(steps=4) + divergence"].allocator == {"name": "greedy", "steps": 4}
    assert found["uniform"].allocator == {"name": "uniform"}


def test_one_side_alone_leaves_the_others_to_the_base_recipe():
    found = cells_of(recipe="flap", allocators=["softmax"])
    assert found["softmax"].pruner == Recipe.load("flap").pruner
    assert found["uniform"].pruner == Recipe.load("flap").pruner


def test_a_learner_takes_the_place_of_an_allocator():
    found = cells_of(pruners=["obs"], allocators=["uniform"], learners=["grasprune"])
    assert found["obs + grasprune"].allocator is None
    assert found["obs + uniform"].learner is None


def test_what_is_taken_over_of_a_learner_is_set_where_one_decides():
    suite = Suite.of_mapping({"learners": ["grasprune"], "allocators": ["table"], "set": {"learned": "counts"}})
    found = {cell.name: cell.recipe.learned for cell in suite.every_cell()}
    assert {name for name, learned in found.items() if learned} == {"grasprune"}
    assert suite.base().learned is None


def test_recipes_are_cells_and_one_of_a_baselines_name_replaces_it(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("pruner: wanda\nallocator: uniform\n")
    found = cells_of(recipes=["fast", str(mine)], cells={"uniform": {"allocator": "uniform", "damping": 0.5}})
    assert found["mine"].pruner == {"name": "wanda"}
    assert found["fast"] == Recipe.load("fast")
    assert found["uniform"].damping == 0.5
    assert "random" in found


def test_a_cell_keeps_its_narrower_heads_and_removes_what_the_others_remove():
    suite = Suite.of_mapping({"recipes": ["olica", "fast", "svd-llm"], "set": {"heads": "query"}})
    base, cells = suite.base(), {cell.name: cell for cell in suite.every_cell()}
    assert cells["olica"].under(base, 0.5, 0).heads == "narrow"
    assert cells["fast"].under(base, 0.5, 0).heads == "query"
    with pytest.raises(WrongInput, match=r"svd-llm has structure: low-rank, and this comparison structure: groups"):
        cells["svd-llm"].under(base, 0.5, 0)
    alike = suite.model_copy(update={"set": {"structure": "low-rank"}}).base()
    assert cells["svd-llm"].under(alike, 0.5, 0).structure == "low-rank"


def test_what_all_cells_share_is_the_base_recipes():
    suite = Suite.of_mapping({"recipes": ["fast"], "set": {"data.calibration_tokens": 4096, "damping": 0.5}})
    (cell,) = [cell for cell in suite.every_cell() if cell.name == "fast"]
    found = cell.under(suite.base().with_overrides({"model": "m", "metric": "kv-cache"}), 0.25, 3)
    assert (found.model, found.sparsity, found.seed, found.metric) == ("m", 0.25, 3, "kv-cache")
    assert found.data.calibration_tokens == 4096
    assert found.damping == 0.5  # of all cells, whatever their recipes say
    assert {cell.recipe.damping for cell in suite.every_cell()} == {0.5}
    assert set(SHARED) <= set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "nothing is to be compared"),
        ({"pruner": ["obs"]}, "no suite key 'pruner'"),
        ({"recipes": ["fast", "fast"]}, "two cells are called 'fast'"),
        ({"recipes": ["nonsense"]}, "no recipe 'nonsense'"),
        ({"cells": {"a": {"sparsity": 0.1}}}, "cell 'a' says sparsity, which all cells share"),
        ({"cells": {"a": {"data.seqlen": 4}}}, "cell 'a' says data.seqlen"),
        ({"recipes": ["fast"], "sparsity": [1.5]}, "sparsity"),
        ({"recipes": ["fast"], "seeds": 0}, "seeds"),
        ({"recipes": ["fast"], "set": {"pruner": "wanda"}}, "pruner is what cells differ in"),
    ],
)
def test_what_cannot_be_compared_is_said(values, said):
    with pytest.raises(WrongInput, match=said):
        Suite.of_mapping(values).every_cell()


def test_a_file_cannot_say_whom_to_talk_to_nor_allow_code(tmp_path):
    for keys, said in (
        ({"allocators": [{"name": "self-pruner", "base_url": "http://x"}]}, "whom to talk to"),
        ({"set": {"engine": "ray://somebody:10001"}}, "whom to talk to"),
        ({"set": {"engine.address": "ray://somebody:10001"}}, "whom to talk to"),
        ({"cells": {"a": {"allocator.base_url": "http://x"}}}, "whom to talk to"),
        ({"set": {"trust_remote_code": True}}, "only the caller can allow"),
    ):
        file = tmp_path / "suite.yaml"
        file.write_text(yaml.safe_dump({"recipes": ["fast"], **keys}))
        with pytest.raises(WrongInput, match=said):
            Suite.load(file)


@pytest.mark.parametrize("name", sorted(presets(SUITES)))
def test_every_suite_that_is_shipped_can_be_read(name):
    assert Suite.load(name).every_cell()
