"""What several do together is what one would have done."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prunekit
from prunekit.demo import MODEL
from prunekit.errors import WrongInput
from prunekit.plugins.engine import dealt
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.session import choose_devices
from prunekit.testing import toy_tokens

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of the demo, in a few seconds."""
    text = tmp_path / "text.txt"
    text.write_text("The wind went up the hill and down again. A boat was on the river, and nobody in it. " * 80)
    few = {"dataset": [str(text)], "evaluation_dataset": str(text), "seqlen": 64, "evaluation_tokens": 512}
    small = {f"data.{key}": value for key, value in {**few, "calibration_tokens": 1024, "search_tokens": 512}.items()}
    search = {"name": "evolution", "generations": 2, "offspring": 4}
    return Recipe.load().with_overrides({"model": str(MODEL), "allocator": search, "verify": False, **small})


def test_an_address_says_the_engine():
    recipe = Recipe.load().with_overrides({"engine": "ray://head:10001", "engine.workers": 8})
    parts = resolve(recipe)
    assert parts.recipe.engine == {"name": "ray", "address": "ray://head:10001", "workers": 8}
    assert resolve(Recipe.load().with_overrides({"engine": "ray"})).recipe.engine["address"] is None
    assert parts.digest == resolve(Recipe.load()).digest  # what comes out is the same
    with pytest.raises(WrongInput, match="there are local, ray"):
        resolve(Recipe.load().with_overrides({"engine": "rey"}))


def test_nothing_is_lost_and_nobody_is_idle():
    assert dealt(range(7), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert dealt(range(2), 5) == [[0], [1]]
    batch = toy_tokens(windows=5, sources=2)
    parts = [batch.rows(rows) for rows in dealt(range(5), 3)]
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    assert sum((part.origins or (part.source,) * len(part) for part in parts), ()) == batch.origins


@pytest.mark.slow  # the same on pretended devices, and of every part of it, are not
def test_a_run_on_two_devices_ends_where_one_does(recipe: Recipe):
    changes = [{"device": device, "dtype": "float64"} for device in ("cpu", "cpu,cpu")]  # sums are in another order
    results = [prunekit.prune(recipe=recipe.with_overrides(each), quiet=True) for each in changes]
    one, other = (result.report for result in results)
    assert [site["kept"] for site in one["sites"]] == [site["kept"] for site in other["sites"]]
    assert one["losses"]["pruned"]["perplexity"] == pytest.approx(other["losses"]["pruned"]["perplexity"], rel=1e-8)
    assert one["search"]["token_forwards"] == other["search"]["token_forwards"]


def test_a_model_that_is_read_block_by_block_is_not_shared_out(recipe: Recipe):
    one, two = torch.device("cpu", 0), torch.device("cpu", 1)
    plan: Any = SimpleNamespace(paged=True, limit=1 << 30, devices=(one, two))
    with pytest.raises(WrongInput, match="give engine local, or more --memory"):
        choose_devices(recipe.with_overrides({"engine": "ray"}), plan)
    asked = recipe.with_overrides({"device": "cpu:0,cpu:1"})
    assert choose_devices(asked, plan) == (one,)  # its blocks are on both
    plan.paged = False
    assert choose_devices(asked, plan) == (one, two)  # copies of it are
