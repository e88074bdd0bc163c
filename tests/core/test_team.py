"""What several do together is what one would have done."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prunekit
from prunekit.adapters import adapter_for
from prunekit.build import build
from prunekit.calibration.flow import BlockFlow
from prunekit.checkpoint import Dense
from prunekit.demo import MODEL
from prunekit.errors import WrongInput
from prunekit.layer import STATISTICS
from prunekit.pipeline import devices_of
from prunekit.progress import Progress
from prunekit.recipe import Recipe
from prunekit.registry import ENGINES, OBJECTIVES
from prunekit.store import CandidateStore
from prunekit.supernet import Supernet
from prunekit.team import Opening, SharedFlow, SharedSupernet, dealt, shards
from prunekit.testing import tiny, toy_supernet, toy_tokens
from prunekit_strategies.pruners.obs.obs import OBS

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


@contextmanager
def threads(model: Any, count: int):
    dense = Dense(model, None, adapter_for(model.config.model_type), torch.float64, "tiny", "")
    with ENGINES.build("local").team(dense, Opening(model), [CPU] * count) as team:
        yield team


def test_one_device_needs_nobody():
    with threads(tiny("llama"), 1) as team:
        assert team is None


def test_nothing_is_lost_and_nobody_is_idle():
    assert dealt(range(7), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert dealt(range(2), 5) == [[0], [1]]
    batch = toy_tokens(windows=5, sources=2)
    parts = shards(batch, 3)
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    assert sum((part.origins for part in parts), ()) == batch.origins


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("count", [2, 3, 9])  # nine are more than there are windows
def test_shards_have_the_moments_of_one_stream(family, count):
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens(windows=4)
    needs = STATISTICS - {"gradient", "contrast", "influence"}
    alone = BlockFlow(tiny(family), adapter, tokens, dense=True)
    with threads(model, count) as team:
        together = SharedFlow(team, tokens, CPU, dense=True)
        for site in adapter.sites(model):
            one, other = alone.received(site, needs), together.received(site, needs)
            assert other.tokens == tokens.n_tokens
            for name in ("gram", "cross", "drift", "mean", "absolute", "relative"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), msg=name)
            assert one.energy == pytest.approx(other.energy)
            weight = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach() * 0.5
            for flow in (alone, together):
                flow.carry(site, weight)
                if site.kind == "mlp":
                    flow.advance(site.block)


def test_a_team_fills_the_same_supernet_and_judges_as_one_does(tmp_path: Path):
    net, tokens = toy_supernet(), toy_tokens(windows=5)
    model, adapter, space = net.model, net.adapter, net.space

    def walked(team: Any) -> Supernet:
        store = CandidateStore(tmp_path / str(team is None), {})
        errors = build(
            model, adapter, space, space.uniform(), OBS(aim="stream"), tokens, store,
            dtype=torch.float64, team=team, progress=Progress(),
        )  # fmt: skip
        alone = Supernet(model, adapter, space, errors, store)
        return alone if team is None else SharedSupernet(alone, team)

    with threads(model, 3) as team:
        one, other = walked(None), walked(team)
        for mine, theirs in zip(one.errors, other.errors, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-8, abs=1e-12)
        for site, ladder in zip(space.sites, space.ladders, strict=True):
            for kept in ladder:
                mine, theirs = one.store.get(site, kept), other.store.get(site, kept)
                assert mine.kept == theirs.kept
                torch.testing.assert_close(mine.weight, theirs.weight)
        alone = Supernet(model, adapter, space, other.errors, other.store)
        start = space.nearest(space.uniform())
        rungs = space.rungs(start)
        fewer = (space.allocation((*rungs[:i], max(r - 1, 0), *rungs[i + 1 :])) for i, r in enumerate(rungs))
        asked = list(dict.fromkeys([start, *fewer]))
        for name in ("divergence", "perplexity", "hidden-state"):
            objective = OBJECTIVES.build(name)
            assert list(other.judged(objective, asked, tokens)) == list(alone.judged(objective, asked, tokens))
        assert [a for a, _ in other.judged(OBJECTIVES.build("divergence"), asked[:1], tokens)] == asked[:1]


def test_who_fails_says_so():
    with threads(tiny("llama"), 2) as team:
        with pytest.raises(AttributeError, match="no_such"):
            team.ask("no_such", [(), ()])
        SharedFlow(team, toy_tokens(), CPU, dense=False)  # and goes on


def test_a_run_on_two_devices_ends_where_one_does(recipe: Recipe):
    results = [
        prunekit.prune(recipe=recipe.with_overrides({"device": device}), quiet=True) for device in ("cpu", "cpu,cpu")
    ]
    one, other = (result.report for result in results)
    assert [site["kept"] for site in one["sites"]] == [site["kept"] for site in other["sites"]]
    assert one["losses"]["pruned"]["perplexity"] == pytest.approx(other["losses"]["pruned"]["perplexity"], rel=1e-3)
    assert one["search"]["token_forwards"] == other["search"]["token_forwards"]


@pytest.mark.parametrize("changes", [{"device": "cpu,cpu"}, {"engine": "ray"}])
def test_a_model_that_is_read_block_by_block_is_not_shared_out(changes: dict[str, Any], recipe: Recipe):
    plan: Any = SimpleNamespace(paged=True, limit=1 << 30)
    with pytest.raises(WrongInput, match="one device and engine local"):
        devices_of(recipe.with_overrides(changes), plan)
