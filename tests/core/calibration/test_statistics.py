"""Every statistic keeps its promises, the core's and a third party's; plug-ins get those that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunekit import Candidate, LayerProblem, LocalPruner, MapShape, PluginError, Received, Signal, Statistic, Total
from prunekit.calibration.fill import build
from prunekit.calibration.moments import GRAM, Moments, collected
from prunekit.calibration.statistics import STATISTICS, Mean, statistics_of
from prunekit.plugins.dense import Dense
from prunekit.plugins.engine import Opening
from prunekit.plugins.registry import ENGINES
from prunekit.search.store import CandidateStore
from prunekit.system.progress import Progress
from prunekit.testing import StatisticSuite, toy_supernet, toy_tokens
from prunekit.testing.statistics import Peak
from prunekit_corner import Kurtosis

OURS = {each.name: each for some in STATISTICS.values() for each in some} | {"gram": GRAM}


@pytest.mark.parametrize("name", list(OURS))
class TestOurs(StatisticSuite):
    @pytest.fixture(autouse=True)
    def _plugin(self, name: str) -> None:
        type(self).plugin = OURS[name]


class TestPeak(StatisticSuite):
    plugin = Peak()


@dataclass(frozen=True)
class Heavy(LocalPruner):
    """Keep the groups whose inputs have the heaviest tails, and write down what it was told."""

    @property
    def needs(self) -> frozenset[str | Statistic]:
        return frozenset({Kurtosis()})

    def prune(self, layer: LayerProblem, keeps: Any) -> list[Candidate]:
        ranking = layer.group_sum(layer.require(Kurtosis())).argsort(descending=True).tolist()
        assert {*layer.statistics} == {"kurtosis"}
        return [layer.masked(sorted(ranking[:keep])) for keep in keeps]


@dataclass(frozen=True)
class Loudest(Signal):
    """The largest input of the site, beside a statistic of the core."""

    @property
    def needs(self) -> frozenset[str | Statistic]:
        return frozenset({"mean", Peak()})

    def measure(self, layer: LayerProblem) -> float:
        return float((layer.require("peak") - layer.require("mean").abs()).max())


def walked(folder: Path, team: Any = None) -> tuple[tuple[tuple[float, ...], ...], CandidateStore]:
    net, store = toy_supernet(), CandidateStore(folder, {})
    errors = build(
        net.model, net.adapter, net.space, net.space.uniform(), Heavy(), toy_tokens(windows=5), store,
        signals=(Loudest(),), dtype=torch.float64, team=team, progress=Progress(),
    )  # fmt: skip
    return errors, store


def test_a_third_partys_statistic_reaches_a_pruner_and_a_signal_wherever_tokens_are_streamed(
    tmp_path: Path, killed_at: Any
) -> None:
    errors, store = walked(tmp_path / "one")
    net = toy_supernet()
    (signals,), _ = store.measured(net.space.sites, scores=False)
    caught: list[Tensor] = []
    site = net.space.sites[0]
    net.adapter.linear(net.blocks[0], site).register_forward_pre_hook(lambda _, x: caught.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        net.model(toy_tokens(windows=5).ids, use_cache=False)
    x = caught[0]
    assert signals[0] == pytest.approx(float((x.abs().amax(0) - x.mean(0).abs()).max()))
    order = torch.tensor(site.columns(range(site.n_groups)))
    tails = (x.pow(4).mean(0) / x.square().mean(0).square())[order].unflatten(0, (site.n_groups, -1)).sum(1)
    assert store.get(site, 1).kept == (int(tails.argmax()),)

    dense = Dense(net.model, None, net.adapter, torch.float64, "toy", "")
    with ENGINES.build("local").team(dense, Opening(net.model), [torch.device("cpu")] * 2) as team:
        assert team is not None
        shared_errors, shared = walked(tmp_path / "two", team)
    for one, two in zip(errors, shared_errors, strict=True):
        assert one == pytest.approx(two, rel=1e-8, abs=1e-12)
    (also,), _ = shared.measured(net.space.sites, scores=False)
    assert signals == pytest.approx(also)

    with killed_at(Heavy, "prune", 3):
        walked(tmp_path / "killed")
    assert walked(tmp_path / "killed")[0] == errors
    for each in net.space.sites:
        name = f"{each.name}.safetensors"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@dataclass(frozen=True)
class Impostor(Mean):
    """Another statistic of a name that is taken."""


def test_needs_become_statistics_and_names_are_one_each() -> None:
    assert statistics_of({"gram", "producers", "gradient", "contrast"}) == ()
    assert [each.name for each in statistics_of({"mean", "drift", Peak()})] == [
        "cross", "drift", "energy", "mean", "peak",
    ]  # fmt: skip
    assert statistics_of({"mean", Mean()}) == (Mean(),)
    with pytest.raises(PluginError, match="no statistic 'meen'; did you mean 'mean'"):
        statistics_of({"meen"})
    for needs in ({Impostor()}, {"mean", Impostor()}):
        with pytest.raises(PluginError, match=r"Impostor\(\) has the name of another statistic, 'mean'"):
            statistics_of(needs)


@pytest.mark.parametrize("name", ["gram", "contrast", "fisher", "energy"])
def test_names_of_the_layers_own_are_taken(name: str) -> None:
    @dataclass(frozen=True)
    class Named(Peak):
        pass

    Named.name = name
    with pytest.raises(PluginError, match="has the name of another statistic"):
        statistics_of({Named()})


def test_a_value_of_another_shape_is_refused() -> None:
    @dataclass(frozen=True)
    class Wide(Peak):
        def finish(self, sums: dict[str, Tensor], total: Total) -> Tensor:
            return torch.zeros(7)

    moments = Moments.empty(collected((Wide(),), residual=True), MapShape(3, 2), torch.device("cpu"))
    moments.add(Received(lambda: torch.ones(5, 3)))
    with pytest.raises(PluginError, match=r"peak: one number or a last dimension of 3 inputs was asked.*\(7,\)"):
        moments.values(torch.ones(2, 3))


def test_what_is_seen_is_computed_when_it_is_asked_for_and_outputs_once() -> None:
    calls: list[str] = []
    linear = nn.Linear(3, 2)
    linear.register_forward_hook(lambda *_: calls.append("output"))

    def asked(name: str) -> Tensor:
        calls.append(name)
        return torch.ones(2, 4, 3)

    received = Received(lambda: asked("inputs"), linear, 4, lambda: asked("residual"))
    assert not calls
    assert received.inputs.shape == (8, 3)
    assert received.windows.shape == (2, 4, 3)
    assert calls == ["inputs"]
    torch.testing.assert_close(received.output - received.product, linear.bias.expand(8, 2))
    assert calls == ["inputs", "output"]
    with pytest.raises(PluginError, match="asked for 'dense', which is not there; it has to say so in what it `sees`"):
        _ = received.dense
