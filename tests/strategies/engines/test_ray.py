"""A cluster of two workers on this machine: the moments, the losses, and the end of one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
from prunekit.adapters import adapter_for
from prunekit.build import build
from prunekit.checkpoint import Dense
from prunekit.demo import MODEL
from prunekit.errors import CannotGoOn
from prunekit.progress import Progress
from prunekit.recipe import Recipe
from prunekit.registry import ENGINES, OBJECTIVES
from prunekit.store import CandidateStore
from prunekit.supernet import Supernet
from prunekit.team import Opening, SharedSupernet
from prunekit.testing import toy_supernet, toy_tokens
from prunekit_strategies.pruners.obs.obs import OBS

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its own warnings are not ours


@pytest.fixture(scope="module")
def team() -> Iterator[Any]:
    model = toy_supernet().model
    dense = Dense(model, None, adapter_for("llama"), torch.float64, "tiny", "")
    engine = ENGINES.build({"name": "ray", "workers": 2})
    with engine.team(dense, Opening(model), [torch.device("cpu")]) as team:
        yield team


def kill(team: Any, worker: int) -> None:
    """As the system does when memory is short."""
    os.kill(ray.get(team.places[worker].actor.process.remote()), signal.SIGKILL)


def test_a_killed_worker_loses_nothing(team: Any, tmp_path: Path) -> None:
    net, tokens = toy_supernet(), toy_tokens(windows=5)
    model, adapter, space = net.model, net.adapter, net.space

    def walked(name: str, team: Any) -> Supernet:
        store = CandidateStore(tmp_path / name, {})
        errors = build(
            model, adapter, space, space.uniform(), OBS(aim="stream"), tokens, store,
            dtype=torch.float64, team=team, progress=Progress(),
        )  # fmt: skip
        return Supernet(model, adapter, space, errors, store)

    class Unlucky:
        """Its second worker dies after every few questions."""

        size, knows, asked = team.size, None, 0

        def ask(self, method: str, each: Any) -> Any:
            self.asked += 1
            if self.asked % 7 == 3:
                kill(team, 1)
            return team.ask(method, each)

    unlucky: Any = Unlucky()
    alone, together = walked("alone", None), walked("together", unlucky)
    assert unlucky.asked > 10
    for mine, theirs in zip(alone.errors, together.errors, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-8, abs=1e-12)
    for site, ladder in zip(space.sites, space.ladders, strict=True):
        assert all(alone.store.get(site, k).kept == together.store.get(site, k).kept for k in ladder)

    start = space.nearest(space.uniform())
    rungs = space.rungs(start)
    asked = [space.allocation((*rungs[:i], max(r - 1, 0), *rungs[i + 1 :])) for i, r in enumerate(rungs)]
    shared = SharedSupernet(together, team)
    for name in ("divergence", "perplexity"):
        objective = OBJECTIVES.build(name)
        kill(team, 0)
        assert dict(shared.judged(objective, asked, tokens)) == dict(together.judged(objective, asked, tokens))


def test_what_a_worker_refuses_is_said_here(team: Any) -> None:
    with pytest.raises(AttributeError, match="no_such"):
        team.ask("no_such", [(), ()])


def test_a_place_where_everybody_dies_is_given_up(team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hire = team.hire

    def doomed(opening: Any) -> Any:
        actor = hire(opening)
        ray.kill(actor)
        return actor

    monkeypatch.setattr(team, "hire", doomed)
    kill(team, 1)
    with pytest.raises(CannotGoOn, match="memory of its node"):
        team.ask("stream", [(toy_tokens(), False)] * 2)
    monkeypatch.undo()
    team.ask("stream", [(toy_tokens(), False)] * 2)


def test_candidates_travel_where_their_folder_is_not_seen(tmp_path: Path, team: Any) -> None:
    from prunekit_strategies.engines.ray import Shipment

    store = toy_supernet().store
    far = Shipment.of(store, far=True)
    (tmp_path / "elsewhere").mkdir()
    hidden = Shipment(store.at(tmp_path / "elsewhere"), far.manifest, far.files)
    copy = hidden.unpacked()
    assert copy.directory not in (store.directory, tmp_path / "elsewhere")
    net = toy_supernet()
    for site, ladder in zip(net.space.sites, net.space.ladders, strict=True):
        for kept in ladder:
            assert torch.equal(copy.get(site, kept).weight, store.get(site, kept).weight)


def test_a_whole_run(tmp_path: Path, team: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The wind went up the hill and down again. A boat was on the river, and nobody in it. " * 80)
    few = {"dataset": [str(text)], "evaluation_dataset": str(text), "seqlen": 64, "evaluation_tokens": 512}
    small = {f"data.{key}": value for key, value in {**few, "calibration_tokens": 1024, "search_tokens": 512}.items()}
    search = {"name": "evolution", "generations": 2, "offspring": 4}
    recipe = Recipe.load().with_overrides({"model": str(MODEL), "allocator": search, "verify": False, **small})
    one, other = (
        prunekit.prune(recipe=recipe.with_overrides({"engine": engine}), quiet=True).report
        for engine in ("local", {"name": "ray", "workers": 2})
    )
    assert [site["kept"] for site in one["sites"]] == [site["kept"] for site in other["sites"]]
    assert one["search"]["token_forwards"] == other["search"]["token_forwards"]
