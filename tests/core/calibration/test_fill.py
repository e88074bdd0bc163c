"""The walk: what is carried, what is checked, what is resumed."""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from prunekit import Candidate, LocalPruner, PluginError, Signal, WrongInput
from prunekit.calibration.fill import build, expected_weight, layer_problem
from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.statistics import statistics_of
from prunekit.models.blocks import entered
from prunekit.search.store import CandidateStore
from prunekit.system.progress import Progress
from prunekit.testing import KeepFirst, toy_supernet, toy_tokens


@dataclass(frozen=True)
class Refit(LocalPruner):
    """Least squares on the first groups."""

    def prune(self, layer, keeps):
        return [layer.refitted(range(keep)) for keep in keeps]


def walk(net, pruner, directory, **options):
    store = CandidateStore(directory, {})
    options = {"carry": "expected", "dtype": torch.float64, "progress": Progress()} | options
    errors = build(net.model, net.adapter, net.space, net.space.uniform(), pruner, toy_tokens(), store, **options)
    return errors, store


def test_errors_are_the_relative_output_errors_by_hand(tmp_path):
    net = toy_supernet()
    site, kept = net.space.sites[0], 1
    stream = BlockFlow(net.model, net.adapter, toy_tokens(), dense=False)
    stream.received(site)
    x = torch.cat([*stream.stream.inputs]).flatten(0, 1)
    dense = net.adapter.linear(net.blocks[0], site).weight
    lost = x @ (dense - net.store.get(site, kept).weight).T
    by_hand = float(lost.square().sum() / (x @ dense.T).square().sum())
    assert net.errors[0][kept] == pytest.approx(by_hand)
    assert net.errors[0][0] == pytest.approx(1)
    assert net.errors[0][-1] == 0


def test_the_expected_weight_weighs_rungs_by_what_they_keep():
    net = toy_supernet()
    site = net.space.sites[1]
    by_hand = sum(k * net.store.get(site, k).weight for k in (2, 5, 9)) / 16
    read = partial(net.store.get, site)
    torch.testing.assert_close(expected_weight(read, (2, 5, 9)), by_hand)
    assert not expected_weight(read, (0,)).any()


@pytest.mark.parametrize("carry", ["dense", "centre", "expected"])
def test_the_carry_decides_what_later_sites_see(tmp_path, carry):
    net = toy_supernet()
    errors, _ = walk(net, KeepFirst(), tmp_path, carry=carry)
    dense, _ = walk(net, KeepFirst(), tmp_path / "dense", carry="dense")
    assert errors[0] == dense[0]
    assert (errors[1] == dense[1]) == (carry == "dense")  # inside the block already


def test_a_resumed_walk_ends_in_the_same_bytes(tmp_path, killed_at):
    net = toy_supernet()
    errors, store = walk(net, Refit(), tmp_path / "whole")
    with killed_at(Refit, "prune", 4):  # at the second MLP
        walk(net, Refit(), tmp_path / "killed")
    again, resumed = walk(net, Refit(), tmp_path / "killed")
    assert again == errors
    for site in net.space.sites:
        name = f"{site.name}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert resumed.errors(net.space.sites[-1]) == store.errors(net.space.sites[-1])


def test_what_is_judged_is_what_is_saved(tmp_path):
    net = toy_supernet()
    _, store = walk(net, Refit(), tmp_path, dtype=torch.bfloat16)
    assert store.get(net.space.sites[0], 1).weight.dtype == torch.bfloat16


def wrong(change):
    class Wrong(LocalPruner):
        def prune(self, layer, keeps):
            return change([layer.masked(range(k)) for k in keeps])

    return Wrong()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:-1], "candidates came"),
        (lambda found: found[::-1], "ascending order were asked"),
        (lambda found: [Candidate((c.kept or ())[::-1], c.weight) for c in found], "ascending order were asked"),
        (lambda found: [Candidate(tuple(g + 3 for g in c.kept or ()), c.weight) for c in found], "ids below 3"),
        (lambda found: [Candidate(c.kept, torch.full_like(c.weight, torch.nan)) for c in found], "not finite"),
        (lambda found: [Candidate(c.kept, torch.ones_like(c.weight)) for c in found], "not zero"),
    ],
)
def test_a_pruner_that_breaks_its_promise_is_named(tmp_path, change, message):
    with pytest.raises(PluginError, match=f"Wrong on model.layers.0.self_attn.o_proj.*{message}"):
        walk(toy_supernet(), wrong(change), tmp_path)


@pytest.mark.parametrize("answer", [None, 7, [None] * 9, "candidates", [torch.zeros(1)] * 9])
def test_a_pruner_answers_with_candidates(answer, tmp_path):
    class Wrong(LocalPruner):
        def prune(self, layer, keeps):
            return answer if not isinstance(answer, list) else answer[: len(keeps)]

    with pytest.raises(PluginError, match=r"Wrong.* was asked|Wrong.*candidates came"):
        walk(toy_supernet(), Wrong(), tmp_path)


def swap(rows):
    rows[[0, 1]] = rows[[1, 0]]


def test_a_pruner_that_ends_the_process_is_an_error(tmp_path):
    class Ending(LocalPruner):
        def prune(self, layer, keeps):
            raise SystemExit(0)

    with pytest.raises(PluginError, match=r"would end the process \(SystemExit: 0\), while Ending worked"):
        walk(toy_supernet(), Ending(), tmp_path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda layer: layer.weight.mul_(1), "layer.weight"),
        (lambda layer: swap(layer.weight.numpy()), "layer.weight"),  # which no sum of values sees
        (lambda layer: layer.gram.add_(0), "layer.gram"),
        (lambda layer: layer.weight.data.mul_(2), "layer.weight"),
        (lambda layer: layer.gram.numpy().fill(1), "layer.gram"),
    ],
)
def test_a_pruner_that_writes_into_its_layer_is_named(write, name, tmp_path):
    class Writing(LocalPruner):
        def prune(self, layer, keeps):
            found = [layer.masked(range(k)) for k in keeps]
            write(layer)
            return found

    with pytest.raises(PluginError, match=rf"Writing on model\.layers\.0\.self_attn\.o_proj changed {name}, which"):
        walk(toy_supernet(), Writing(), tmp_path)


def test_activations_that_are_not_finite_name_the_site(tmp_path):
    net = toy_supernet()
    block: Any = net.blocks[1]
    block.mlp.up_proj.weight.data.fill_(torch.inf)
    with pytest.raises(WrongInput, match=r"layers\.1\.mlp\.down_proj receives values that are not finite"):
        walk(net, KeepFirst(), tmp_path)


@dataclass(frozen=True)
class Crossed(Signal):
    """Asks for much, says the power that goes through the site."""

    @property
    def needs(self):
        return frozenset({"cross", "drift", "mean", "influence"})

    def measure(self, layer):
        assert layer.require("cross") is layer.cross
        assert {*layer.statistics} == {"mean", "influence"}  # nobody asked for more
        return float(layer.gram.trace())


@dataclass(frozen=True)
class Ranked(Refit):
    """Every group is worth its number."""

    def scores(self, layer):
        assert layer.cross is None  # the signal asked, this pruner did not
        assert not layer.statistics
        return torch.arange(layer.n_groups)


def test_signals_and_scores_are_measured_at_every_site_and_change_nothing_else(tmp_path):
    net = toy_supernet()
    plain, _ = walk(net, Ranked(), tmp_path / "plain")
    errors, store = walk(net, Ranked(), tmp_path / "measured", signals=(Crossed(),), scores=True)
    assert errors == plain
    sites = net.space.sites
    (signals,), scores = store.measured(sites, scores=True)
    assert scores == tuple(tuple(range(site.n_groups)) for site in sites)
    stream = BlockFlow(net.model, net.adapter, toy_tokens(), dense=False)
    assert signals[0] == pytest.approx(float(stream.received(sites[0]).gram.trace()))
    assert len(set(signals)) == len(sites)


def test_a_resumed_walk_measures_only_what_is_missing(tmp_path):
    net = toy_supernet()
    _, whole = walk(net, Refit(), tmp_path / "whole", signals=(Crossed(),))

    seen = []

    class Killed(Crossed):
        def measure(self, layer):
            seen.append(layer.name)
            if len(seen) == 4:
                raise KeyboardInterrupt
            return super().measure(layer)

    with pytest.raises(KeyboardInterrupt):
        walk(net, Refit(), tmp_path / "killed", signals=(Killed(),))
    _, resumed = walk(net, Refit(), tmp_path / "killed", signals=(Killed(),))
    assert seen == [s.name for s in net.space.sites[:4]] + [s.name for s in net.space.sites[3:]]
    assert resumed.measured(net.space.sites, scores=False) == whole.measured(net.space.sites, scores=False)


@dataclass(frozen=True)
class Lost(Signal):
    """Says something that is not a number, or asks for what there is not."""

    wish: str = "gram"

    @property
    def needs(self):
        return frozenset({self.wish})

    def measure(self, layer):
        return float("nan")


def test_measurements_that_break_their_promise_are_named(tmp_path):
    net = toy_supernet()
    with pytest.raises(PluginError, match=r"Lost on model\.layers\.0.*a finite number was asked, not nan"):
        walk(net, Refit(), tmp_path / "a", signals=(Lost(),))
    with pytest.raises(PluginError, match="Lost needs the moon, which calibration cannot collect"):
        walk(net, Refit(), tmp_path / "b", signals=(Lost("the moon"),))
    with pytest.raises(PluginError, match=r"Refit on model\.layers\.0.*3 finite scores were asked.*not None"):
        walk(net, Refit(), tmp_path / "c", scores=True)


def test_there_is_no_influence_where_a_norm_comes_after_the_sum(tmp_path, monkeypatch):
    net = toy_supernet()
    monkeypatch.setattr(type(net.adapter), "adds_up", lambda *_: False)
    with pytest.raises(WrongInput, match="the stream is not a sum of outputs, so there is no influence"):
        walk(net, Refit(), tmp_path, signals=(Lost("influence"),))


def problem(net, site, needs, **more):
    flow = BlockFlow(net.model, net.adapter, toy_tokens(), dense=False)
    moments = flow.received(site, statistics_of(needs))
    return layer_problem(net.model, net.adapter, site, moments, needs, 0.01, **more)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_feeders_are_the_rows_that_go_when_a_group_goes(family, heads):
    net = toy_supernet(family, heads=heads)
    attention, mlp = net.space.sites[:2]
    for site in (attention, mlp):
        layer = problem(net, site, frozenset({"producers"}))
        kept = tuple(range(1, site.n_groups))
        own = net.adapter.linear(net.blocks[0], site).weight
        block = copy.deepcopy(net.blocks[0])
        for path, module in net.adapter.pruned(block, site, Candidate(kept, own)).items():
            block.set_submodule(path, module)
        names = {producer.name for producer in layer.producers}
        changed = {
            name.removesuffix(".weight")
            for name, value in block.named_parameters()
            if name.endswith(".weight") and value.shape[0] != net.blocks[0].get_parameter(name).shape[0]
        }
        assert names == changed
        for producer in layer.producers:
            rows = producer.weight.unflatten(0, (site.n_groups, -1))[1:].flatten(0, 1)
            cut = block.get_parameter(f"{producer.name}.weight")
            assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, cut.tolist()))


def test_the_power_of_feeders_is_that_of_the_stream_that_reaches_them():
    net = toy_supernet()
    site = net.space.sites[1]
    flow = BlockFlow(net.model, net.adapter, toy_tokens(), dense=False)
    attention = net.space.sites[0]
    flow.received(attention)
    carried = net.store.get(attention, 1).weight
    flow.carry(attention, carried)
    needs = frozenset({"power"})
    layer = layer_problem(net.model, net.adapter, site, flow.received(site, statistics_of(needs)), needs, 0.01)
    block: Any = copy.deepcopy(net.blocks[0])
    block.self_attn.o_proj.weight.data = carried
    seen = []
    block.mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    with torch.no_grad():
        hidden, calls = entered(net.model, net.adapter, toy_tokens().ids)
        calls[0](block, hidden)
    assert [producer.name for producer in layer.producers] == ["mlp.gate_proj", "mlp.up_proj"]
    for producer in layer.producers:
        torch.testing.assert_close(producer.require("power"), seen[0].square().mean(0))


def test_what_nobody_needs_is_not_there():
    net = toy_supernet()
    layer = problem(net, net.space.sites[0], frozenset({"gram"}))
    assert layer.producers == ()
    assert not layer.statistics


def test_the_contrast_is_what_the_second_data_set_brings_through_the_same_carried_weights(tmp_path):
    net, second = toy_supernet(), toy_tokens(seed=7)
    found = []

    @dataclass(frozen=True)
    class Against(KeepFirst):
        @property
        def needs(self):
            return frozenset({"contrast"})

        def prune(self, layer, keeps):
            found.append((layer.require("contrast"), layer.gram.diagonal()))
            return super().prune(layer, keeps)

    errors, _ = walk(net, Against(), tmp_path / "one", contrast=second)
    assert errors == walk(net, KeepFirst(), tmp_path / "two")[0]
    swapped = found.copy()
    found.clear()
    store = CandidateStore(tmp_path / "three", {})
    build(
        net.model, net.adapter, net.space, net.space.uniform(), Against(), second, store,
        contrast=toy_tokens(), dtype=torch.float64, progress=Progress(),
    )  # fmt: skip
    for (contrast, own), (back, forth) in zip(swapped, found, strict=True):
        torch.testing.assert_close((contrast, own), (forth, back))  # candidates do not hang on the tokens here


@pytest.mark.parametrize("need", ["contrast", "gradient", "thoughts"])
def test_a_need_that_nobody_meets_is_refused(tmp_path, need):
    class Wants(KeepFirst):
        @property
        def needs(self):
            return frozenset({"gram", need})

    with pytest.raises(PluginError, match=f"Wants needs {need}, which calibration cannot collect"):
        walk(toy_supernet(), Wants(), tmp_path)


def test_query_heads_are_pruned_evenly_from_every_kv_group(tmp_path):
    net = toy_supernet(heads="query", pruner=Refit())
    site = net.space.sites[0]
    candidate = net.store.get(site, 1)
    block: Any = net.adapter.pruned(net.blocks[0], site, candidate)["self_attn"]
    assert block.q_proj.out_features == block.k_proj.out_features  # one query head per KV head
    own: Any = net.blocks[0]
    assert own.self_attn.k_proj.out_features == block.k_proj.out_features
