"""What local distillation promises: the refit of a linear map, never worse held out, what it says it sends."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from prunekit import Candidate, CutSubLayer, LocalPruner, PluginError, SubLayer, WrongInput
from prunekit.calibration.fill import build
from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.sublayer import StreamedSubLayer, chunked, token_forwards
from prunekit.plugins.learner import Effort
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.system.progress import Progress
from prunekit.testing import KeepFirst, tiny, toy_layer, toy_supernet, toy_tokens
from prunekit.testing.layers import MapAlone, damped_loss
from prunekit_strategies.pruners.distilled import Distilled
from prunekit_strategies.pruners.score import Magnitude

TOKENS = toy_tokens(windows=12)
TRAINED = Distilled(KeepFirst(), steps=6, every=3)


@pytest.fixture(scope="module")
def net():
    """Whose model and space are borrowed, with few rungs."""
    toy = toy_supernet()
    ladders = tuple(tuple(sorted({0, 1, site.n_groups // 2, site.n_groups})) for site in toy.space.sites)
    return Supernet(toy.model, toy.adapter, replace(toy.space, ladders=ladders), (), toy.store)


def filled(net, pruner, folder, **options):
    """A store of a pass on dense inputs, and its errors."""
    store = CandidateStore(folder, {})
    given = {"carry": "dense", "dtype": torch.float64, "progress": Progress()} | options
    errors = build(net.model, net.adapter, net.space, net.space.uniform(), pruner, TOKENS, store, **given)
    return errors, store


@pytest.fixture(scope="module")
def library(net, tmp_path_factory):
    """(errors, store) of trained candidates."""
    return filled(net, TRAINED, tmp_path_factory.mktemp("library"))


def exact(**options):
    return toy_layer(8, dtype=torch.float64, moments=torch.float64, **options)


def test_on_a_linear_map_it_comes_to_the_least_squares_refit():
    layer = exact()
    layer = replace(layer, sublayer=MapAlone(layer))
    (start,) = Magnitude().prune(layer, [4])
    (found,) = Distilled(Magnitude(), steps=250, every=25, rate=0.1).prune(layer, [4])
    assert start.kept is not None
    assert found.kept == start.kept
    refit = layer.refitted(start.kept)
    least, before = damped_loss(layer, refit.weight), damped_loss(layer, start.weight)
    assert least < 0.9 * before
    assert damped_loss(layer, found.weight) - least < 1e-4 * (before - least)
    torch.testing.assert_close(found.weight, refit.weight, rtol=1e-2, atol=1e-2)


def test_what_is_best_already_stays_to_the_bit():
    layer = exact()
    layer = replace(layer, sublayer=MapAlone(layer))
    refit = Distilled(Refit(), steps=4, every=1).prune(layer, [0, 3, 8])
    for candidate, plain in zip(refit, Refit().prune(layer, [0, 3, 8]), strict=True):
        assert torch.equal(candidate.weight, plain.weight)


@dataclass(frozen=True)
class Refit(LocalPruner):
    """Least squares on the first groups."""

    def prune(self, layer, keeps):
        return [layer.refitted(range(keep)) for keep in keeps]


class Misled(SubLayer):
    """One weight: what is learned from says up, and what is held out says down."""

    @property
    def chunks(self):
        return (3, 1)

    def shapes(self, kept):
        return []

    def cut(self, candidate):
        return MisledCut()


class MisledCut(CutSubLayer):
    def __init__(self):
        self.weights = [torch.ones(1, requires_grad=True)]

    def losses(self, chunk):
        return (self.weights[0] * (1 if chunk else -1)).expand(1 if chunk else 3)

    def candidate(self):
        raise AssertionError("nothing was gained")


def test_steps_that_held_out_windows_do_not_bear_are_undone():
    layer = replace(toy_layer(), sublayer=Misled())
    (found,) = replace(TRAINED, held_out=0.25).prune(layer, [3])
    assert torch.equal(found.weight, layer.masked(range(3)).weight)


def test_no_steps_are_the_bytes_of_the_inner_pruner(net, tmp_path):
    for name, pruner in (("inner", Refit()), ("none", Distilled(Refit(), steps=0))):
        filled(net, pruner, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "inner").iterdir())
    assert len(files) == len(net.space.sites) + 1
    for name in files:
        assert (tmp_path / "inner" / name).read_bytes() == (tmp_path / "none" / name).read_bytes()


def counts_of(net, site):
    return net.space.ladders[net.space.sites.index(site)]


def trained_counts(net, store, site):
    return [kept for kept in counts_of(net, site) if store.get(site, kept).producers]


def test_masks_are_the_inner_pruners_and_all_maps_are_trained(net, library):
    _, store = library
    for site in net.space.sites:
        assert all(store.get(site, kept).kept == tuple(range(kept)) for kept in counts_of(net, site))
        trained = trained_counts(net, store, site)
        assert site.n_groups // 2 in trained
        assert not {0, site.n_groups} & {*trained}, "all and nothing are not trained"
        for kept in trained:
            candidate = store.get(site, kept)
            dense = net.adapter.linear(net.blocks[site.block], site).weight
            assert not torch.equal(candidate.weight, dense * (candidate.weight != 0))
            part = net.adapter.pruned(net.blocks[site.block], site, candidate)
            plain = net.adapter.pruned(net.blocks[site.block], site, Candidate(candidate.kept, candidate.weight))
            ((_, one), (_, two)) = *part.items(), *plain.items()
            changed = [not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
            assert sum(changed) == len(candidate.producers) == (3 if site.kind == "attention" else 2)


def test_trained_candidates_lose_less_and_the_table_is_what_cut_blocks_lose(net, library, tmp_path):
    errors, store = library
    plain, _ = filled(net, KeepFirst(), tmp_path)
    for site, row, before in zip(net.space.sites, errors, plain, strict=True):
        trained = trained_counts(net, store, site)
        for kept, now, then in zip(counts_of(net, site), row, before, strict=True):
            assert now < then if kept in trained else now == then
    site = net.space.sites[1]  # an MLP
    flow = BlockFlow(net.model, net.adapter, TOKENS, dense=False)
    flow.received(net.space.sites[0])
    flow.carry(net.space.sites[0], None)
    flow.received(site)
    block, kept = net.blocks[site.block], site.n_groups // 2
    ((path, cut),) = net.adapter.pruned(block, site, store.get(site, kept)).items()
    seen = []
    with torch.no_grad():
        handle = block.get_submodule(path).register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        net.model(TOKENS.ids)
        handle.remove()
        ((x, y),) = seen
        by_hand = float((cut(x) - y).square().sum() / y.square().sum())
    assert errors[1][counts_of(net, site).index(kept)] == pytest.approx(by_hand, rel=1e-6)


def test_the_small_model_has_the_weights_that_were_trained(net, library):
    errors, store = library
    trained = Supernet(net.model, net.adapter, net.space, errors, store)
    plan = tuple(site.n_groups // 2 for site in net.space.sites)
    site, kept = net.space.sites[0], plan[0]
    small = trained.assemble(plan)
    query = net.adapter.maps(net.adapter.blocks(small)[0], site)[0].weight
    assert torch.equal(query, store.get(site, kept).producers[0].to(query))


def test_what_it_says_it_sends_is_what_it_sends(net, library):
    _, store = library
    weights = sum(map(net.adapter.multiplied, net.blocks))
    chunks = chunked(len(TOKENS), TOKENS.seqlen)
    each = TRAINED.effort(chunks, TOKENS.seqlen)
    assert each == Effort(6, 3 * TOKENS.n_tokens, 6 * TOKENS.n_tokens, steps=6)  # one chunk, judged three times
    for site in net.space.sites:
        some = len({*counts_of(net, site)} - {0, site.n_groups})
        judged = len(trained_counts(net, store, site))  # those that have gained, on all tokens
        sent = Effort(0, some * each.forward + judged * TOKENS.n_tokens, some * each.back)
        assert store.trained([site]) == token_forwards(sent, site, weights) > 0


def test_several_chunks_take_turns_and_the_last_windows_are_held_out():
    pruner = Distilled(KeepFirst(), steps=5, every=2, held_out=0.25)
    assert chunked(10, 512) == [4, 4, 2]
    effort = pruner.effort([4, 4, 2], 512)
    assert effort.back == 512 * (4 + 4 + 4 + 4 + 4)  # the last chunk is held out
    assert effort.forward == 512 * 2 * (1 + 3)
    with pytest.raises(WrongInput, match="two windows"):
        pruner.effort([1], 512)


def test_a_pass_that_was_stopped_ends_in_the_same_bytes(net, library, tmp_path, killed_at):
    with killed_at(Distilled, "prune", 3):
        filled(net, TRAINED, tmp_path)
    filled(net, TRAINED, tmp_path)
    for site in net.space.sites:
        name = f"{site.name}.safetensors"
        assert (tmp_path / name).read_bytes() == (library[1].directory / name).read_bytes()
    sealed = json.loads((tmp_path / "manifest.json").read_text())
    assert sealed == json.loads((library[1].directory / "manifest.json").read_text())


@pytest.mark.parametrize(("family", "options"), [("phi3", {}), ("llama", {"heads": "query"}), ("opt", {})])
def test_fused_maps_spread_heads_and_biases_train_too(family, options, tmp_path):
    net = toy_supernet(family, num_hidden_layers=1, **options)
    ladders = tuple((0, site.n_groups // 2, site.n_groups) for site in net.space.sites)
    net = Supernet(net.model, net.adapter, replace(net.space, ladders=ladders), (), net.store)
    errors, _ = filled(net, TRAINED, tmp_path / "trained")
    plain, _ = filled(net, KeepFirst(), tmp_path / "plain")
    assert all(row[1] < before[1] for row, before in zip(errors, plain, strict=True))
    net = Supernet(net.model, net.adapter, net.space, errors, CandidateStore(tmp_path / "trained", {}))
    assert len(list(net.logits(tuple(row[1] for row in ladders), TOKENS))) == 1


def test_half_precision_trains_in_float32_and_is_rounded(tmp_path):
    model = tiny("llama", num_hidden_layers=1).bfloat16().requires_grad_(False)
    net = toy_supernet()
    sites = net.adapter.sites(model)
    whole = Space.whole(sites, Budget.keeping(0.5, sites))
    space = replace(whole, ladders=tuple((site.n_groups // 2,) for site in sites))
    half = Supernet(model, net.adapter, space, (), net.store)
    rounded = {"dtype": torch.bfloat16}
    errors, store = filled(half, TRAINED, tmp_path / "trained", **rounded)
    plain, _ = filled(half, KeepFirst(), tmp_path / "plain", **rounded)
    assert all(now < then for (now,), (then,) in zip(errors, plain, strict=True))
    assert {weight.dtype for weight in store.get(sites[0], 1).producers} == {torch.bfloat16}


def test_prices_in_nats_of_trained_candidates_are_of_their_outputs(net, tmp_path):
    site = net.space.sites[0]
    flow = BlockFlow(net.model, net.adapter, TOKENS, dense=False)
    flow.received(site)
    whole = StreamedSubLayer.of(net.adapter, site, net.blocks[0], flow.stream)
    weight = net.adapter.linear(net.blocks[0], site).weight
    own = torch.zeros_like(weight)
    own[:, : site.group_size] = weight[:, : site.group_size]
    root = torch.eye(len(weight), dtype=torch.float64)
    error, price = whole.judged(Candidate((0,), own), root)
    assert price == pytest.approx(0.5 * error * whole.power / TOKENS.n_tokens)  # R = I: half the squared error
    gram = torch.cat([*flow.stream.inputs]).flatten(0, 1).double()
    lost = gram @ (weight - own).T
    assert error == pytest.approx(float(lost.square().sum() / (gram @ weight.T).square().sum()))


def test_who_brings_other_producer_layers_than_asked_is_told(net, tmp_path):
    @dataclass(frozen=True)
    class Odd(LocalPruner):
        def prune(self, layer, keeps):
            return [replace(layer.masked(range(keep)), producers=(layer.weight,)) for keep in keeps]

    with pytest.raises(PluginError, match="producer layers of shapes"):
        filled(net, Odd(), tmp_path)


def test_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(ValueError, match="steps"):
        Distilled(steps=-1)
    experts = toy_supernet("mixtral", num_hidden_layers=1)
    with pytest.raises(WrongInput, match="plain linear maps"):
        filled(experts, TRAINED, tmp_path)
