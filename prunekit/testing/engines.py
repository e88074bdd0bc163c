"""What every engine promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from prunekit.calibration.fill import build
from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.shared import SharedFlow
from prunekit.calibration.statistics import STATISTICS, statistics_of
from prunekit.layer.candidates import Candidate
from prunekit.layer.problem import LayerProblem
from prunekit.plugins.dense import Dense
from prunekit.plugins.engine import Engine, Opening, Team
from prunekit.plugins.objective import Objective
from prunekit.plugins.pruner import LocalPruner
from prunekit.search.shared import SharedSupernet
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.system.progress import Progress
from prunekit.testing.statistics import Peak
from prunekit.testing.supernets import KeepFirst, toy_supernet, toy_tokens


class Aimed(KeepFirst):
    """Keeps the first groups, refitted to the dense stream."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", "cross", "drift"})

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        return [layer.refitted(range(keep)) for keep in keeps]


@dataclass(frozen=True)
class Spread(Objective):
    """An objective that hardly anybody would write: how far the logits are from zero."""

    def loss(self, net, allocation, batch):  # type: ignore[no-untyped-def]
        return float(sum(logits.square().sum() for _, logits in net.logits(allocation, batch)))


class EngineSuite:
    """A team streams, prunes and judges as one worker does, but for the order of sums; failures are said."""

    plugin: ClassVar[Engine]
    devices: ClassVar[Sequence[str]] = ("cpu", "cpu")

    @pytest.fixture(scope="class")
    @classmethod
    def team(cls) -> Iterator[Team]:
        model = toy_supernet().model
        dense = Dense(model, None, toy_supernet().adapter, torch.float64, "toy", "")
        with cls.plugin.team(dense, Opening(model), [torch.device(device) for device in cls.devices]) as team:
            if team is None:
                pytest.skip("this engine needs nobody else here")
            yield team

    def test_shards_have_the_moments_of_one_stream(self, team: Team) -> None:
        net, tokens = toy_supernet(), toy_tokens(windows=5)
        statistics = statistics_of({*STATISTICS, Peak()})  # a third party's, too
        alone = BlockFlow(net.model, net.adapter, tokens, dense=True)
        together = SharedFlow(team, tokens, torch.device("cpu"), dense=True)
        for site in net.space.sites:
            one, other = alone.received(site, statistics), together.received(site, statistics)
            assert other.tokens == tokens.n_tokens
            weight = net.adapter.linear(net.blocks[site.block], site).weight.detach()
            torch.testing.assert_close(one.gram, other.gram)
            values = one.values(weight)
            assert Peak.name in values
            torch.testing.assert_close(values, other.values(weight), msg=f"{site.name}: {', '.join(values)}")
            weight = weight * 0.5
            for flow in (alone, together):
                flow.carry(site, weight if site.block else None)
                if site.kind == "mlp":
                    flow.advance(site.block, None if site.block else {site: weight})

    def test_fewer_windows_than_workers_are_enough(self, team: Team) -> None:
        net, tokens = toy_supernet(), toy_tokens(windows=1)
        site = net.space.sites[0]
        one = BlockFlow(net.model, net.adapter, tokens, dense=False).received(site)
        assert torch.equal(SharedFlow(team, tokens, torch.device("cpu"), dense=False).received(site).gram, one.gram)

    def test_a_supernet_is_filled_and_judged_as_by_one(self, team: Team, tmp_path: Path) -> None:
        alone, together = filled(tmp_path / "alone", None), filled(tmp_path / "together", team)
        for mine, theirs in zip(alone.errors, together.errors, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-8, abs=1e-12)
        for site, ladder in zip(alone.space.sites, alone.space.ladders, strict=True):
            for kept in ladder:
                mine_, theirs_ = alone.store.get(site, kept), together.store.get(site, kept)
                assert mine_.kept == theirs_.kept
                torch.testing.assert_close(mine_.weight, theirs_.weight)
        asked, tokens, objective = questions(together), toy_tokens(windows=3), Spread()
        found = list(SharedSupernet(together, team).judged(objective, [*asked, asked[0]], tokens))
        assert found == list(together.judged(objective, asked, tokens))

    def test_what_a_worker_refuses_is_said(self, team: Team) -> None:
        with pytest.raises(AttributeError, match="no_such_work"):
            team.ask("no_such_work", [(), ()])
        self.test_fewer_windows_than_workers_are_enough(team)  # and the next question is answered


def filled(folder: Path, team: Team | None, pruner: LocalPruner | None = None) -> Supernet:
    """A toy supernet whose calibration tokens a team has streamed."""
    net = toy_supernet()
    store = CandidateStore(folder, {})
    errors = build(
        net.model, net.adapter, net.space, net.space.uniform(), pruner or Aimed(), toy_tokens(windows=5), store,
        dtype=torch.float64, team=team, devices=() if team is None else team.devices, progress=Progress(),
    )  # fmt: skip
    return Supernet(net.model, net.adapter, net.space, errors, store)


def questions(net: Supernet) -> list[Allocation]:
    """Allocations that differ in one site each."""
    start = net.space.nearest(net.space.uniform())
    rungs = net.space.rungs(start)
    fewer = (net.space.allocation((*rungs[:i], max(r - 1, 0), *rungs[i + 1 :])) for i, r in enumerate(rungs))
    return list(dict.fromkeys([start, *fewer]))
