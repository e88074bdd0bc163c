"""What is promised of bytes is what is taken; what cannot fit is refused before any work."""

import json
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from prunekit import LayerProblem, WrongInput
from prunekit.adapters import adapter_for
from prunekit.build import build
from prunekit.calibration import flow
from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.moments import Moments
from prunekit.checkpoint import skeleton
from prunekit.contracts import Objective, Problem
from prunekit.ledger import Ledger
from prunekit.memory import GIB, Room, Shares
from prunekit.pipeline import foreseen, whole_space
from prunekit.plan import (
    Rates,
    activations_bytes,
    forward_flops,
    judging_flops,
    moments_bytes,
    moments_flops,
    rehearsed,
    store_bytes,
    walks,
)
from prunekit.progress import Progress
from prunekit.recipe import Recipe
from prunekit.registry import ALLOCATORS, PRUNERS
from prunekit.search import converse
from prunekit.sites import Budget, Site, Space, Structure
from prunekit.store import CandidateStore
from prunekit.testing import KeepFirst, KeepLargest, tiny, toy_supernet, toy_tokens

EVERYTHING = frozenset({"gram", "cross", "drift", "absolute", "relative", "power"})


def sites_of(model, adapter, structure):
    return adapter.sites(model) if structure == "groups" else adapter.linear_sites(model, Structure.parsed(structure))


def d_out(model, adapter, site):
    return adapter.linear(adapter.blocks(model)[site.block], site).out_features


@pytest.mark.parametrize("needs", [frozenset({"gram"}), frozenset({"cross"}), EVERYTHING], ids=len)
@pytest.mark.parametrize("structure", ["groups", "weights"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_moments_take_what_was_counted(family, structure, needs):
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    stream = BlockFlow(model, adapter, tokens, dense=bool({"cross", "drift"} & needs))
    for site in sites_of(model, adapter, structure):
        if site.block:
            break
        moments = stream.received(site, needs)
        block = adapter.blocks(model)[0]
        fed = [block.get_parameter(f"{cut.path}.weight").shape[1] for cut in adapter.cuts(block, site)[:-1]]
        held = [getattr(moments, field.name) for field in fields(Moments)]
        taken = sum(v.nbytes for v in (*held, *moments.fed.values()) if isinstance(v, torch.Tensor))
        part = adapter.part(site) is not None
        assert taken == moments_bytes(site.d_in, d_out(model, adapter, site), needs, part=part, fed=fed), site.name
        stream.carry(site, None)


@pytest.mark.parametrize(
    ("family", "structure", "dtype"),
    [("llama", "groups", torch.bfloat16), ("gpt_neox", "groups", torch.float32), ("llama", "weights", torch.float64)],
)
def test_candidates_take_what_was_counted(family, structure, dtype, tmp_path):
    model, adapter = tiny(family).float(), adapter_for(family)
    sites = sites_of(model, adapter, structure)
    space = Space.whole(sites, Budget.keeping(0.5, sites))
    store, pruner = CandidateStore(tmp_path, {}), KeepFirst() if structure == "groups" else KeepLargest()
    run = partial(build, model, adapter, space, space.uniform(), pruner, toy_tokens(), store)
    run(carry="dense", dtype=dtype, progress=Progress())
    for site, ladder in zip(space.sites, space.ladders, strict=True):
        counted = store_bytes(site, d_out(model, adapter, site), ladder, dtype)
        assert (tmp_path / f"{site.name}.safetensors").stat().st_size == counted, site.name


def test_scores_are_counted_with_the_candidates(tmp_path):
    net = toy_supernet()
    site, store = net.space.sites[0], CandidateStore(tmp_path, {})
    candidates = [net.store.get(site, kept) for kept in (1, 2)]
    store.put(site, candidates, [0.0, 0.0], scores=[1.0] * site.n_groups)
    counted = store_bytes(site, d_out(net.model, net.adapter, site), (1, 2), torch.float64, scores=True)
    assert (tmp_path / f"{site.name}.safetensors").stat().st_size == counted


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("structure", ["groups", "weights"])
def test_activations_take_what_was_counted(structure, dense, monkeypatch):
    monkeypatch.setattr(flow, "TOKENS_AT_ONCE", 24)
    model, adapter, tokens = tiny("llama"), adapter_for("llama"), toy_tokens()
    room, most = Room(), []
    put = room.put
    monkeypatch.setattr(room, "put", lambda tensor: (put(tensor), most.append(room.held))[0])
    stream = BlockFlow(model, adapter, tokens, dense=dense, room=room)
    sites = [site for site in sites_of(model, adapter, structure) if site.block == 0]
    for site in sites:
        stream.received(site)
        stream.carry(site, None)
    stream.advance(0)
    block = [(site.d_in, adapter.part(site) is not None, bool(site.shares)) for site in sites]
    assert max(most) == activations_bytes(tokens.n_tokens, 24, 8, block, 1 + dense)


def test_products_are_those_that_torch_counts():
    model, tokens = tiny("llama"), toy_tokens()
    model.set_attn_implementation("eager")  # torch counts no products of the fused kernel
    blocks = list(model.model.layers)
    weights = sum(m.weight.numel() for b in blocks for m in b.modules() if isinstance(m, nn.Linear))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens.ids)
    head = 2 * tokens.n_tokens * model.lm_head.weight.numel()
    assert counter.get_total_flops() == head + forward_flops(tokens.n_tokens, weights, 3 * 24, tokens.seqlen)
    moments = Moments.empty(17, torch.device("cpu"))
    x, w = torch.randn(40, 17), torch.randn(24, 17)
    with FlopCounterMode(display=False) as counter:
        moments.add(x)
        moments.add_made(torch.randn(40, 24), x)
        moments.add_drift(torch.randn(40, 24), x)
    assert counter.get_total_flops() == moments_flops(40, 17, 24, {"cross"})
    with FlopCounterMode(display=False) as counter:
        moments.add(x)
        moments.add_paired(x, x)
    assert counter.get_total_flops() == moments_flops(40, 17, 24, {"cross"}, part=False, paired=True)
    layer = LayerProblem(w, torch.eye(17))
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            layer.error(w * 0.5)
    assert counter.get_total_flops() == judging_flops(17, 24, 3)


# -- searches -----------------------------------------------------------------------------------------


def whole(groups=64, sites=6):
    some = [Site(f"s{i}", i // 2, "mlp", groups, 1, 10) for i in range(sites)]
    return Space.whole(some, Budget.keeping(0.5, some))


def test_walks_of_coarse_to_fine_are_all_there():
    tyr = ALLOCATORS.build({"name": "tyr", "inner": "uniform"})
    spaces = walks(tyr, whole())
    assert [space.stride for space in spaces] == [1 / 8, 1 / 16, 1 / 32, 1 / 64, spaces[-1].stride]
    assert [len(space.ladders[0]) for space in spaces] == [9, 9, 9, 9, 1]


@pytest.mark.parametrize("spec", [{"name": "uniform"}, {"name": "random", "draws": 8}, {"name": "softmax"}])
def test_a_search_is_rehearsed_to_count_what_the_ledger_will(spec, tmp_path):
    net, tokens, ledger = toy_supernet(), toy_tokens(), Ledger(tmp_path / "ledger")
    allocator = ALLOCATORS.build(spec)
    problem = Problem(net.space, net.errors, net.space.uniform(), 0, tokens.n_tokens)
    converse(allocator, problem, net, _Price(), tokens, ledger, walk=0, progress=Progress())
    assert ledger.tokens > 0
    assert rehearsed(allocator, net.space, tokens.n_tokens, tokens.seqlen) == ledger.tokens
    assert rehearsed(allocator, net.space, tokens.n_tokens, tokens.seqlen, limit=10) == 10


class _Price(Objective):
    """Any loss will do."""

    def loss(self, net, allocation, batch):
        return -float(net.space.cost(allocation))


def test_what_asks_the_outside_world_is_not_rehearsed():
    class Asks(type(ALLOCATORS.build({"name": "uniform"}))):
        def search(self, problem):
            problem.journal.once({"ask": "you"}, lambda: pytest.fail("asked"))
            return (yield from super().search(problem))

    assert rehearsed(Asks(), whole(), 1024, 64) is None


# -- whole plans --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny("llama").bfloat16().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of a third of a billion parameters, of which there is the config alone."""
    path = tmp_path_factory.mktemp("large")
    heads: dict[str, Any] = {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 96,
        "vocab_size": 2000,
    }
    LlamaConfig(hidden_size=512, intermediate_size=1536, dtype="bfloat16", **heads).save_pretrained(path)
    return path


def plan_of(folder, output=None, **changes):
    base, overrides = Recipe.load("fast"), {"model": str(folder), **changes}
    several = base.spread(overrides)
    asked = None if several is None else list(several.family)
    recipe = (several or base.with_overrides(overrides)).checked()
    return foreseen(recipe, *skeleton(str(folder)), output, asked)


def test_what_fits_is_opened_whole_and_what_does_not_block_by_block(folder, large):
    roomy = plan_of(large, memory="900GiB")
    assert not roomy.paged
    tight = plan_of(large, memory="1GB")
    assert tight.paged
    assert tight.least < roomy.least
    for plan in (roomy, tight):
        assert max(stage.memory + stage.shared for stage in plan.stages) <= max(plan.limit, plan.least)
    model, _ = skeleton(str(large))
    blocks = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    assert (roomy.block, roomy.resident) == (blocks, (2000 * 512 + 512) * 4)  # float32 on a CPU; the head is a page
    assert not plan_of(folder, memory="1MB").paged  # blocks of nothing


def test_a_plan_says_which_stages_there_are_and_what_nobody_knows(folder, tmp_path):
    plan = plan_of(folder, tmp_path / "new" / "out", **{"finishers": ["bias"], "data.seqlen": 16})
    assert [stage.name for stage in plan.stages] == [
        "open", "prune 1", "search 1", "rebuild", "finish", "evaluate", "export",
    ]  # fmt: skip
    rates = Rates(1e9, 1e8, 1e8)
    told = json.loads(json.dumps(plan.as_dict(rates)))
    assert not told["seconds_complete"]
    assert [row["name"] for row in told["stages"] if row["seconds"] is None] == ["finish"]
    assert told["disk"] == sum(row["disk"] for row in told["stages"])
    assert told["stages"][2]["flops"] == 0  # expected-error reads no tokens
    assert plan.free_disk
    assert plan.place == tmp_path


def test_the_candidates_of_a_plan_are_those_of_the_run(folder, tmp_path):
    plan = plan_of(folder, allocator="uniform", rebuild=False)
    model, adapter = skeleton(str(folder))
    recipe = Recipe.load("fast").with_overrides({"model": str(folder), "allocator": "uniform"}).checked()
    space = whole_space(recipe, model, adapter, torch.bfloat16)
    space = ALLOCATORS.build(recipe.allocator).first_space(space)
    store, dense = CandidateStore(tmp_path, {}), tiny("llama").bfloat16().float()
    build(
        dense, adapter, space, space.uniform(), PRUNERS.build(recipe.pruner), toy_tokens(), store,
        dtype=torch.bfloat16, progress=Progress(),
    )  # fmt: skip
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    (walk,) = [stage for stage in plan.stages if stage.name == "prune 1"]
    assert walk.disk == written


def test_what_cannot_fit_is_refused(folder, large, tmp_path):
    with pytest.raises(WrongInput, match=r"takes at least .* block by block .* are there"):
        plan_of(large, memory="1MB").check()
    plan = replace(plan_of(folder, tmp_path, memory="900GiB"), limit=900 * GIB)
    plan.check()
    with pytest.raises(WrongInput, match=r"this run writes .* the disk has 1,000 B free"):
        replace(plan, free_disk=1000).check()
    with pytest.raises(WrongInput, match="no amount of memory"):
        plan_of(folder, memory="much")


def test_a_model_in_memory_is_never_paged(folder):
    recipe = Recipe.load("fast").with_overrides({"memory": "1MB"}).checked()
    model, adapter = tiny("llama"), adapter_for("llama")
    plan = foreseen(recipe, model, adapter, None)
    assert not plan.paged
    assert plan.shares == Shares(None, 0, 0, 0, 0)


def test_rates_are_measured(tmp_path):
    rates = Rates.measured(torch.device("cpu"), torch.float32, tmp_path)
    assert min(rates.flops, rates.read, rates.write) > 1e5
    assert not list(tmp_path.iterdir())
