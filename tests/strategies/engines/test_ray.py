"""A cluster of two workers on this machine, and the end of one of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
from prunekit.demo import MODEL
from prunekit.errors import CannotGoOn, WrongInput
from prunekit.plugins.registry import ENGINES, OBJECTIVES
from prunekit.recipe.schema import Recipe
from prunekit.search.shared import SharedSupernet
from prunekit.testing import EngineSuite, toy_supernet, toy_tokens
from prunekit.testing.engines import filled, questions
from prunekit_strategies.engines.ray import Ray, Shipment

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its warnings are not ours


def kill(team: Any, worker: int) -> None:
    """As the system does when memory is short."""
    os.kill(ray.get(team.places[worker].actor.process.remote()), signal.SIGKILL)


class Unlucky:
    """A team whose second worker dies before every seventh question."""

    knows = None

    def __init__(self, team: Any) -> None:
        self.team, self.size, self.devices, self.asked = team, team.size, team.devices, 0

    def ask(self, method: str, each: Any) -> Any:
        self.asked += 1
        if self.asked % 7 == 3:
            kill(self.team, 1)
        return self.team.ask(method, each)


class TestRay(EngineSuite):
    plugin = ENGINES.build({"name": "ray", "workers": 2})

    def test_a_killed_worker_loses_nothing(self, team: Any, tmp_path: Path) -> None:
        unlucky: Any = Unlucky(team)
        alone, together = filled(tmp_path / "alone", None), filled(tmp_path / "together", unlucky)
        assert unlucky.asked > 10
        for mine, theirs in zip(alone.errors, together.errors, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-8, abs=1e-12)
        shared = SharedSupernet(together, team)
        for name in ("divergence", "perplexity"):
            objective, tokens = OBJECTIVES.build(name), toy_tokens(windows=3)
            kill(team, 0)
            asked = questions(together)
            assert list(shared.judged(objective, asked, tokens)) == list(together.judged(objective, asked, tokens))

    def test_a_place_where_everybody_dies_is_given_up(self, team: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        hire = team.hire

        def doomed(opening: Any) -> Any:
            actor = hire(opening)
            ray.kill(actor)
            return actor

        with monkeypatch.context() as patched:
            patched.setattr(team, "hire", doomed)
            kill(team, 1)
            with pytest.raises(CannotGoOn, match="memory of its node"):
                team.ask("stream", [(toy_tokens(), False)] * 2)
        team.ask("stream", [(toy_tokens(), False)] * 2)

    def test_candidates_travel_where_their_folder_is_not_seen(self, team: Any, tmp_path: Path) -> None:
        net, far = toy_supernet(), tmp_path / "far"
        there = Shipment.of(net.store, far=True)
        far.mkdir()
        copy = Shipment(net.store.at(far), there.manifest, there.files).unpacked()
        assert copy.directory not in (net.store.directory, far)
        for site, ladder in zip(net.space.sites, net.space.ladders, strict=True):
            for kept in ladder:
                assert torch.equal(copy.get(site, kept).weight, net.store.get(site, kept).weight)


@pytest.mark.parametrize(
    "decides",
    [
        {"allocator": {"name": "evolution", "generations": 2, "offspring": 4}},
        {"learner": {"name": "grasprune", "steps": 4, "batch_tokens": 64}},
    ],
)
def test_a_run_on_a_cluster_ends_where_one_here_does(tmp_path: Path, decides: dict[str, Any]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The wind went up the hill and down again. A boat was on the river, and nobody in it. " * 80)
    few = {"dataset": [str(text)], "evaluation_dataset": str(text), "seqlen": 64, "evaluation_tokens": 512}
    small = {f"data.{key}": value for key, value in {**few, "calibration_tokens": 1024, "search_tokens": 512}.items()}
    recipe = Recipe.load().with_overrides({"model": str(MODEL), **decides, "verify": False, **small})
    one, other = (
        prunekit.prune(recipe=recipe.with_overrides({"engine": engine}), quiet=True).report
        for engine in ("local", {"name": "ray", "workers": 2})
    )
    assert [site["kept"] for site in one["sites"]] == [site["kept"] for site in other["sites"]]
    assert one["search"]["token_forwards"] == other["search"]["token_forwards"]


def test_cells_of_a_comparison_on_a_cluster_have_the_rows_of_those_here(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The wind went up the hill and down again. A boat was on the river, and nobody in it. " * 80)
    few = {"dataset": str(text), "evaluation_dataset": str(text), "seqlen": 64, "evaluation_tokens": 512}
    few |= {"calibration_tokens": 1024, "search_tokens": 512}
    searched = {"allocator": {"name": "evolution", "generations": 1, "offspring": 2}, "objective": "divergence"}
    one, other = (
        prunekit.compare(
            MODEL, recipe="fast", pruners=["magnitude"], cells={"searched": searched}, data=few,
            engine=engine, output=tmp_path / str(i), quiet=True,
        ).rows
        for i, engine in enumerate(["local", {"name": "ray", "workers": 2}])
    )  # fmt: skip
    assert [row.cell for row in one] == ["dense", "uniform", "random", "magnitude", "searched"]
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.key, mine.state, mine.parameters) == (theirs.key, theirs.state, theirs.parameters)
        assert (mine.token_forwards, mine.questions) == (theirs.token_forwards, theirs.questions)
        # moments are added up in another order, so that a near tie of two groups may fall the other way
        assert mine.losses == pytest.approx(theirs.losses, rel=5e-3), mine.cell


def test_a_cluster_that_is_not_there_is_said() -> None:
    nothing: Any = None
    with (
        pytest.raises(WrongInput, match=r"no Ray cluster at '127\.0\.0\.1:1'"),
        Ray("127.0.0.1:1").team(*[nothing] * 3),
    ):
        raise AssertionError("there is one")
