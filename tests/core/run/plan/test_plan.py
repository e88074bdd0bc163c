"""What is promised of bytes is what is taken; what cannot fit is refused before any work."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import prunekit
from prunekit import LayerProblem, WrongInput
from prunekit.calibration.fill import build
from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.moments import GRAM, Moments
from prunekit.calibration.statistics import Cross, Drift, statistics_of
from prunekit.layer.problem import judging_flops
from prunekit.layer.statistics import MapShape, Received
from prunekit.measure import latency
from prunekit.models import blocks as blocks_of
from prunekit.models.adapters.find import adapter_for
from prunekit.models.blocks import forward_flops
from prunekit.models.opening import opened, skeleton
from prunekit.plugins.allocator import Problem
from prunekit.plugins.objective import Objective
from prunekit.plugins.registry import ALLOCATORS
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run import family, session
from prunekit.run.plan import make as planning
from prunekit.run.plan.count import CUSHION, KEPT, Shape
from prunekit.run.plan.plan import Stage
from prunekit.run.plan.rehearsal import Rehearsal, between, foresee_limit, list_passes, rehearsed
from prunekit.run.session import make_plan
from prunekit.run.spaces import whole_space
from prunekit.search.conversation import converse
from prunekit.search.ledger import Ledger
from prunekit.search.probing import Spent
from prunekit.search.store import CandidateStore
from prunekit.search.teacher import Teacher
from prunekit.space.budgets import Budget
from prunekit.space.forms import parse_form
from prunekit.space.ladders import Space
from prunekit.space.prices import Curve, Prices, Workload
from prunekit.space.sites import Site
from prunekit.system.memory import GIB, Room, Shares
from prunekit.system.progress import Progress
from prunekit.system.rates import Rates
from prunekit.testing import KeepFirst, KeepLargest, tiny, toy_supernet, toy_tokens
from prunekit.testing.supernets import KeepSpectrum

EVERYTHING = frozenset({"gram", "cross", "drift", "absolute", "relative", "power"})


def sites_of(model, adapter, structure):
    return adapter.sites_of(model, parse_form(structure))


def d_out(model, adapter, site):
    return adapter.linear(adapter.blocks(model)[site.block], site).out_features


@pytest.mark.parametrize("needs", [frozenset({"gram"}), frozenset({"cross"}), EVERYTHING], ids=len)
@pytest.mark.parametrize("structure", ["groups", "weights", "low-rank"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_moments_take_what_was_counted(family, structure, needs):
    model, adapter, tokens, statistics = tiny(family), adapter_for(family), toy_tokens(), statistics_of(needs)
    stream = BlockFlow(model, adapter, tokens, dense=bool({"cross", "drift"} & needs))
    sites = sites_of(model, adapter, structure)
    shape = Shape(model, adapter, sites, torch.float64, torch.float64)
    for site in (site for site in sites if not site.block):
        moments = stream.received(site, statistics)
        taken = sum(value.nbytes for sums in moments.sums.values() for value in sums.values())
        there = shape.collected(site, statistics)
        assert taken == Moments.bytes(there, shape.map(site), shape.producers(site)), site.name
        stream.carry(site, None)


@pytest.mark.parametrize(
    ("family", "structure", "dtype"),
    [
        ("llama", "groups", torch.bfloat16),
        ("gpt_neox", "groups", torch.float32),
        ("llama", "weights", torch.float64),
        ("qwen2", "low-rank", torch.bfloat16),
    ],
)
def test_candidates_take_what_was_counted(family, structure, dtype, tmp_path):
    model, adapter = tiny(family).float(), adapter_for(family)
    sites = sites_of(model, adapter, structure)
    space = Space.whole(sites, Budget.keeping(0.5, sites))
    toys = {"groups": KeepFirst(), "weights": KeepLargest(), "low-rank": KeepSpectrum()}
    store, pruner = CandidateStore(tmp_path, {}), toys[structure]
    run = partial(build, model, adapter, space, space.uniform(), pruner, toy_tokens(), store)
    run(carry="dense", dtype=dtype, progress=Progress())
    for site, ladder in zip(space.sites, space.ladders, strict=True):
        counted = CandidateStore.bytes(site, ladder, dtype)
        assert (tmp_path / f"{site.name}.safetensors").stat().st_size == counted, site.name


def test_scores_are_counted_with_the_candidates(tmp_path):
    net = toy_supernet()
    site, store = net.space.sites[0], CandidateStore(tmp_path, {})
    candidates = [net.store.get(site, kept) for kept in (1, 2)]
    store.put(site, candidates, [0.0, 0.0], scores=[1.0] * site.n_groups)
    counted = CandidateStore.bytes(site, (1, 2), torch.float64, scores=True)
    assert (tmp_path / f"{site.name}.safetensors").stat().st_size == counted


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("structure", ["groups", "weights"])
def test_activations_take_what_was_counted(structure, dense, monkeypatch):
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 24)
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
    block = [(site.d_in, adapter.part(site) is not None, bool(site.input_group)) for site in sites]
    assert max(most) == BlockFlow.peak(tokens.n_tokens, 24, 8, block, 1 + dense)


@pytest.mark.parametrize("k", [7, 1000])
def test_what_the_dense_model_says_takes_what_was_counted(k, monkeypatch):
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 24)
    net, tokens = toy_supernet(), toy_tokens()
    counted = Teacher.bytes(tokens.n_tokens, k, 61)
    net.teacher = Teacher(Shares(teacher=counted // 2, teacher_disk=counted // 2))
    list(net.dense_top(tokens, k))
    room = net.teacher.room
    assert (room.held, room.spilled) == (counted // 2, counted // 2)


def test_products_are_those_that_torch_counts():
    model, tokens = tiny("llama"), toy_tokens()
    model.set_attn_implementation("eager")  # torch counts no products of the fused kernel
    blocks = list(model.model.layers)
    weights = sum(m.weight.numel() for b in blocks for m in b.modules() if isinstance(m, nn.Linear))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens.ids)
    head = 2 * tokens.n_tokens * model.lm_head.weight.numel()
    assert counter.get_total_flops() == head + forward_flops(tokens.n_tokens, weights, 3 * 24, tokens.seqlen)
    for d_out in (8, 24):  # pairs of inputs are the larger product, or the smaller
        linear, shape = nn.Linear(17, d_out), MapShape(17, d_out)
        for values in linear.parameters():
            values.requires_grad_(False)
        inputs, residual = partial(torch.randn, 40, 17), partial(torch.randn, 40, d_out)
        dense = Received(inputs, linear, residual=residual)
        assert dense.made.shape == (40, d_out)  # the stream is in need of it anyway
        for statistic in (GRAM, Cross(), Drift()):
            sums = statistic.start(shape, torch.device("cpu"))
            with FlopCounterMode(display=False) as counter:
                statistic.add(sums, Received(inputs, linear, residual=residual, dense=dense))
            assert counter.get_total_flops() == statistic.flops(shape, 40)
    w = torch.randn(24, 17)
    layer = LayerProblem(w, torch.eye(17))
    with FlopCounterMode(display=False) as counter:
        for _ in range(3):
            layer.error(w * 0.5)
    assert counter.get_total_flops() == judging_flops(17, 24, [17] * 3, cross=False)
    beside = replace(layer, cross=w, energy=1.0)
    cut = w * (torch.arange(17) < 5)
    with FlopCounterMode(display=False) as counter:
        for weight in (w, cut, w * 0):
            beside.error(weight)
    assert counter.get_total_flops() == judging_flops(17, 24, [17, 5, 0], cross=True)


# -- searches -----------------------------------------------------------------------------------------


def whole(groups=64, sites=6):
    some = [Site(f"s{i}", i // 2, "mlp", groups, 1, 10) for i in range(sites)]
    return Space.whole(some, Budget.keeping(0.5, some))


def test_walks_of_coarse_to_fine_are_all_there():
    tyr = ALLOCATORS.build({"name": "tyr", "inner": "uniform"})
    spaces = list_passes(tyr, whole())
    assert [space.stride for space in spaces] == [1 / 8, 1 / 16, 1 / 32, 1 / 64, spaces[-1].stride]
    assert [len(space.ladders[0]) for space in spaces] == [9, 9, 9, 9, 1]


@pytest.mark.parametrize(
    "spec", [{"name": "uniform"}, {"name": "random", "draws": 8}, {"name": "softmax", "table": "errors"}]
)
def test_a_search_is_rehearsed_to_count_what_the_ledger_will(spec, tmp_path):
    net, tokens, ledger = toy_supernet(), toy_tokens(), Ledger(tmp_path / "ledger")
    allocator = ALLOCATORS.build(spec)
    problem = Problem(net.space, net.errors, net.space.uniform(), 0, tokens.n_tokens)
    converse(allocator, problem, net, _Price(), tokens, ledger, pass_number=0, progress=Progress())
    assert ledger.tokens > 0
    assert rehearsed(allocator, net.space, tokens.n_tokens, tokens.seqlen).forwards == ledger.tokens
    assert rehearsed(allocator, net.space, tokens.n_tokens, tokens.seqlen, limit=10).forwards == 10


class _Price(Objective):
    """Any loss will do."""

    def loss(self, net, allocation, batch):
        return -float(net.space.cost(allocation))


def test_what_asks_the_outside_world_is_not_rehearsed():
    class Asks(type(ALLOCATORS.build({"name": "uniform"}))):
        def search(self, problem):
            problem.journal.once({"ask": "you"}, lambda: pytest.fail("asked"))
            return (yield from super().search(problem))

    assert rehearsed(Asks(), whole(), 1024, 64) == Rehearsal()


def test_a_rehearsal_hides_no_fault_of_an_allocator():
    class Broken(type(ALLOCATORS.build({"name": "uniform"}))):
        def search(self, problem):
            yield from super().search(problem)
            raise NotImplementedError("of its own")

    with pytest.raises(NotImplementedError, match="of its own"):
        rehearsed(Broken(), whole(), 1024, 64)


def test_a_rehearsal_ends_after_so_many_questions_however_long_they_take():
    allocator = ALLOCATORS.build({"name": "random", "draws": 8})
    asked = rehearsed(allocator, whole(), 1024, 64).allocations
    assert asked
    assert rehearsed(allocator, whole(), 1024, 64, patience=asked - 1) == Rehearsal()
    assert rehearsed(allocator, whole(), 1024, 64, patience=math.inf).forwards is not None


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
        "num_hidden_layers": 24,
        "vocab_size": 2000,
    }
    LlamaConfig(hidden_size=1024, intermediate_size=3072, dtype="bfloat16", **heads).save_pretrained(path)
    return path


def plan_of(folder, output=None, **changes):
    base, overrides = Recipe.load("fast"), {"model": str(folder), **changes}
    several = base.spread(overrides)
    asked = None if several is None else list(several.family)
    parts = resolve(several or base.with_overrides(overrides))
    return make_plan(parts, *skeleton(str(folder)), output, asked)


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
    assert (roomy.block, roomy.resident) == (blocks, (2000 * 1024 + 1024) * 4)  # float32 on a CPU; the head is a page
    assert not plan_of(folder, memory="1MB").paged  # blocks of nothing


def test_layers_that_several_devices_work_on_are_in_memory_at_once(large):
    def held(count, **changes):
        stages = plan_of(large, device=",".join(["cpu"] * count), **changes).stages
        return next(stage.memory for stage in stages if stage.name == "prune 1")

    one, two, three = (held(count, memory="900GiB") for count in (1, 2, 3))
    layer = three - two  # that one more device works on
    assert layer >= (1 + 3) * 8 * 3072**2  # the gram of its inputs, and what is made of it
    assert two - one >= layer  # beside the statistics of the next
    assert held(1, memory="1GB") == held(3, memory="1GB")  # one copy of a paged model: nobody else works


def untimed(plan):
    return [stage for stage in plan.stages if stage.name in ("prune 1", "rebuild")]


def test_a_pass_takes_as_long_as_its_pruner_and_statistics_where_they_were_tried(folder):
    recipe = Recipe.load("fast").with_overrides({"model": str(folder), "samples": 3, "data.seqlen": 16})
    parts, shape = resolve(recipe), skeleton(str(folder))
    trials, untried = session.tried(parts, shape), make_plan(parts, *shape, None)
    by_name = {stage.name: stage for stage in make_plan(parts, *shape, None, rehearse=True, trials=trials).stages}
    passes = [by_name["prune 1"], by_name["rebuild"]]
    assert all(stage.own > 0 and not stage.unknown for stage in passes)
    assert all((stage.flops or 0) < (other.flops or 0) for stage, other in zip(passes, untimed(untried), strict=True))
    added = (untimed(untried)[0].flops or 0) - (passes[0].flops or 0)
    paces = [pace for pace in trials.paces.values() if pace]
    least, most = (added / pace for pace in (max(paces), min(paces)))
    known = [seconds for seconds in trials.known.values() if seconds is not None]
    few, many = (count * len(sites_of(*shape, "groups")) for count in (min(known), max(known)))
    assert few + least <= passes[0].own <= many + most
    rates = Rates(1e9, 1e9, 1e8, 1e8)
    assert (by_name["rebuild"].seconds(rates) or 0) > by_name["rebuild"].own
    assert [stage.unknown for stage in untimed(untried)] == ["the work of obs itself"] * 2
    assert (by_name["sample"].flops or 0) > (by_name["evaluate"].flops or 0) / 100
    plain = make_plan(resolve(recipe.with_overrides({"samples": 0})), *shape, None)
    assert "sample" not in [stage.name for stage in plain.stages]


def test_a_plan_says_which_stages_there_are_and_what_nobody_knows(folder, tmp_path):
    plan = plan_of(folder, tmp_path / "new" / "out", **{"finishers": ["bias"], "data.seqlen": 16})
    assert [stage.name for stage in plan.stages] == [
        "open", "fisher", "prune 1", "search 1", "rebuild", "finish", "dense model", "evaluate", "export",
    ]  # fmt: skip
    rates = Rates(1e9, 1e9, 1e8, 1e8)
    told = json.loads(json.dumps(plan.as_dict(rates)))
    assert not told["seconds_complete"]
    assert [row["name"] for row in told["stages"] if row["seconds"] is None] == ["finish"]
    assert told["disk"] == sum(row["disk"] for row in told["stages"])
    assert told["stages"][3]["flops"] == 0  # expected-error reads no tokens
    assert plan.free_disk
    assert plan.place == tmp_path


def test_the_candidates_of_a_plan_are_those_of_the_run(folder, tmp_path):
    plan = plan_of(folder, allocator="uniform", rebuild=False)
    model, adapter = skeleton(str(folder))
    parts = resolve(Recipe.load("fast").with_overrides({"model": str(folder), "allocator": "uniform"}))
    space = parts.allocator.first_space(whole_space(parts, model, adapter, torch.bfloat16))
    store, dense = CandidateStore(tmp_path, {}), tiny("llama").bfloat16().float()
    build(
        dense, adapter, space, space.uniform(), parts.pruner, toy_tokens(), store,
        dtype=torch.bfloat16, progress=Progress(),
    )  # fmt: skip
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    (walk,) = [stage for stage in plan.stages if stage.name == "prune 1"]
    assert walk.disk == written


@pytest.mark.parametrize("pruner", ["magnitude", "obs"])
def test_what_finds_no_room_in_memory_is_on_the_disk_of_the_plan(folder, tmp_path, monkeypatch, pruner):
    few = {"data.calibration_tokens": 48, "data.seqlen": 12, "allocator": "uniform", "pruner": pruner}
    plan, roomy = (plan_of(folder, memory=memory, rebuild=False, **few) for memory in ("1MB", "900GiB"))
    parts = resolve(Recipe.load("fast").with_overrides({"model": str(folder), **few}))
    room, store, spilled = Room(plan.shares.activations, tmp_path / "room"), CandidateStore(tmp_path / "store", {}), []
    put = room.put
    monkeypatch.setattr(room, "put", lambda tensor: (put(tensor), spilled.append(files(tmp_path / "room")))[0])
    model, adapter = skeleton(str(folder))
    space = parts.allocator.first_space(whole_space(parts, model, adapter, torch.bfloat16))
    build(
        tiny("llama").bfloat16().float(), adapter, space, space.uniform(), parts.pruner,
        toy_tokens(), store, dtype=torch.bfloat16, room=room, progress=Progress(),
    )  # fmt: skip
    tight, wide = (next(s for s in each.stages if s.name == "prune 1") for each in (plan, roomy))
    assert tight.disk == wide.disk == files(tmp_path / "store")
    assert wide.spilled == 0
    assert max(spilled) / 2 <= tight.spilled <= max(spilled)


def test_what_is_spilled_is_gone_before_the_next_stage_and_what_is_written_is_not(folder):
    plan = plan_of(folder, memory="1MB")
    stages = [Stage("a", 0, disk=5, spilled=40), Stage("b", 0, disk=30, spilled=20), Stage("c", 0, disk=1)]
    assert replace(plan, stages=tuple(stages)).disk == 55
    with pytest.raises(WrongInput, match="this run writes 55 B, b alone 50 B"):
        replace(plan, stages=tuple(stages), limit=1, free_disk=54).check()


def files(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("memory", ["900GiB", "1GB"])
def test_what_the_dense_model_says_is_written_once_and_held_to_the_end(memory, large, monkeypatch):
    monkeypatch.setattr(planning, "_taken", lambda _: 0)  # which grows from one plan to the next
    text = {"data.search_tokens": 2**18, "data.seqlen": 64, "allocator": "tyr", "memory": memory}
    inner = {"name": "divergence", "top_k": 3000}
    listening = plan_of(large, objective={"name": "robust", "inner": inner}, **text)
    silent = plan_of(large, objective="perplexity", **text)
    said = Teacher.bytes(2**18, 3000, 2000)
    inside = min(said, listening.shares.teacher)
    assert (inside == said) == (memory == "900GiB")
    stages, first = list(listening.stages), 2
    hearing = stages.pop(first)
    assert [stage.name for stage in stages[:4]] == ["open", "prune 1", "search 1", "prune 2"]
    assert (hearing.name, hearing.disk) == ("dense model", said - inside)
    for i, (one, other) in enumerate(zip(stages, silent.stages, strict=True)):
        assert one.disk == other.disk, one.name
        assert one.shared - other.shared == (inside if i >= first else 0), one.name


SMALL = {"data.calibration_tokens": 64, "data.search_tokens": 64, "data.evaluation_tokens": 64, "data.seqlen": 32}


def test_the_disk_of_a_family_is_counted_walk_by_walk(saved_tiny, tmp_path, killed_at, monkeypatch):
    path, output = saved_tiny(), tmp_path / "out"
    changes: dict[str, Any] = {"allocator": "uniform", "pruner": "magnitude", "sparsity": [0.4, 0.2]}
    changes["objective"] = {"name": "expected-error", "table": "fisher"}
    plan = plan_of(path, output, **changes, **SMALL)
    assert [stage.name for stage in plan.stages] == [
        "open", "fisher", "prune 1", "search 1 for 0.2", "search 1 for 0.4",
        *(f"{name} for {share}" for share in (0.2, 0.4) for name in ("rebuild", "evaluate", "export")),
    ]  # fmt: skip
    settings = {key.replace(".", "__"): value for key, value in SMALL.items()}
    with killed_at(family, "publish", 1):
        prunekit.prune(path, output=output, recipe="fast", quiet=True, verify=False, **changes, **settings)
    place = tmp_path / "out.partial"
    walks_ = sum(file.stat().st_size for file in place.glob("walk-*/*.safetensors"))
    walks = sum(stage.disk for stage in plan.stages if stage.name.split()[0] in ("prune", "rebuild"))
    assert walks / 2 < walks_ <= walks  # another allocation than the uniform one would fill it
    told = {row["sparsity"]: row["disk"] for row in plan.as_dict(Rates(1e9, 1e9, 1e8, 1e8))["members"]}
    for share, disk in told.items():
        (export,) = [stage.disk for stage in plan.stages if stage.name == f"export for {share}"]
        header = (place / "result" / str(share) / "model.safetensors").stat().st_size - export
        assert 0 < header < 8192
        assert disk == sum(stage.disk for stage in plan.stages if stage.member == str(share))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    there = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    assert there > walks_
    assert plan_of(path, output, **changes, **SMALL).free_disk == 1000 + there  # need not be written again


def test_of_a_family_that_is_searched_for_one_member_one_is_made(folder):
    recipe = Recipe.load("fast").with_overrides({"model": str(folder), "sparsity": 0.4, "family": [0.2, 0.4]})
    plan = make_plan(resolve(recipe), *skeleton(str(folder)), None)
    assert [stage.name for stage in plan.stages] == [
        "open", "fisher", "prune 1", "search 1 for 0.2", "search 1 for 0.4", "rebuild for 0.4",
        "dense model", "evaluate for 0.4", "export for 0.4",
    ]  # fmt: skip


def test_zeros_are_written_like_other_numbers(folder, tmp_path):
    changes = {"structure": "weights", "pruner": "magnitude", "allocator": "uniform"}
    (export,) = [stage for stage in plan_of(folder, tmp_path / "out", **changes).stages if stage.name == "export"]
    assert export.disk == sum(p.nbytes for p in tiny("llama").bfloat16().parameters())


def test_what_one_search_knows_no_other_pays_for():
    allocator, space = ALLOCATORS.build({"name": "table", "around": "dense", "stride": 0.25, "candidates": 2}), whole()
    known: dict[Any, float] = {}
    first = rehearsed(allocator, space, 128, 64, known=known).forwards
    assert first == sum(tokens for _, tokens in known)
    assert rehearsed(allocator, space, 128, 64, known=known).forwards == 0


def test_a_search_may_end_early_or_late():
    patient = {"name": "evolution", "generations": 40, "patience": 3, "offspring": 4, "warm_start": "none"}
    question = (ALLOCATORS.build(patient), whole(), 1024, 64)
    likely = rehearsed(*question)
    found = between(likely, *question)
    assert None not in (found.least, likely.forwards, found.most)
    assert 0 < (found.least or 0) < (likely.forwards or 0) < (found.most or 0)  # patience, and every generation
    stages = {"selections": [[1, 1024]], "generations": 5, "filter": 1, "patience": 2}
    question = (ALLOCATORS.build(patient | stages), whole(), 1024, 64)
    found = between(rehearsed(*question), *question)
    assert (found.least, found.most) == (1024 * (1 + 2 * 4), 1024 * (1 + 5 * 4))
    assert between(Rehearsal(), *question) == Rehearsal()
    stage = Stage("search 1", 0, flops=50, spread=(20, 100))
    assert stage.between(Rates(10, 1, 1, 1)) == (2, 10)
    assert replace(stage, spread=(50, 50)).between(Rates(10, 1, 1, 1)) is None


@pytest.mark.parametrize("name", ["evolution", "greedy", "nsga", "table"])
def test_a_limit_that_probes_use_up_is_foreseen_as_it_comes(name, tmp_path):
    net, tokens = toy_supernet(), toy_tokens()
    probes = len(net.space.sites) * 2 + 1
    problem = Problem(net.space, net.errors, net.space.uniform(), tokens=tokens.n_tokens)
    allocator = ALLOCATORS.build({"name": name})

    def foreseen(limit):
        return rehearsed(allocator, net.space, tokens.n_tokens, tokens.seqlen, limit=limit).spent

    class Judged(Objective):
        def loss(self, net, allocation, batch):
            return sum(net.site_errors(allocation))

    for limit in (tokens.n_tokens, tokens.n_tokens * probes + 1):
        ledger = Ledger(tmp_path / f"{limit}")
        converse(allocator, problem, net, Judged(), tokens, ledger, pass_number=0, limit=limit, progress=Progress())
        ended = Spent.of_record(json.loads(ledger.text().splitlines()[-1]))
        assert (ended.probes, ended.others, ended.by_probes) == (ledger.tokens, 0, True)
        told = foreseen(limit)
        assert told is not None
        assert replace(told, asked=ended.asked) == ended  # how much comes next depends on what the table says
    enough = foreseen(tokens.n_tokens * 10_000)
    assert enough is None or not enough.by_probes


def test_a_limit_on_all_passes_is_foreseen_in_the_first_alone():
    def foresee(limit, **options):
        return foresee_limit(ALLOCATORS.build({"name": "tyr", **options}), whole(), 1024, 64, limit, lambda _: 0)

    first = foresee(13 * 1024, inner="table")
    assert first is not None
    assert first.by_probes
    assert foresee(10**9, inner="table") is None
    assert foresee(40 * 1024, inner={"name": "table", "table": "errors"}) is None  # it ends a later pass


def test_a_plan_says_where_probes_use_up_the_limit(folder):
    def told(limit):
        parts = resolve(Recipe.load("search").with_overrides({"model": str(folder), "search_budget": limit}))
        stages = make_plan(parts, *skeleton(str(folder)), None, rehearse=True).stages
        return next(stage.told for stage in stages if stage.name == "search 1")

    assert "search_budget is 16: nothing is asked" in told(16)
    assert "warning" not in told(10**9)


def test_latency_is_timed_before_and_after_and_only_whole(folder, large, monkeypatch):
    plan = plan_of(folder, target="latency=0.6")
    names = [stage.name for stage in plan.stages]
    assert names[:4] == ["open", "time sub-layers", "fisher", "prune 1"]
    assert names[-2:] == ["time the result", "export"]
    assert not plan.as_dict(Rates(1e9, 1e9, 1e8, 1e8))["seconds_complete"]
    assert not plan_of(large, memory="900GiB", target="latency=0.6").paged
    monkeypatch.setattr(session, "opened", None)
    with pytest.raises(WrongInput, match=r"takes at least .* give more, or another metric: latency is timed on whole"):
        prunekit.prune(large, target="latency=0.6", memory="1GB", recipe="fast", quiet=True)
    with pytest.raises(WrongInput, match=r"latency\.prompt \+ latency\.new_tokens"):
        plan_of(folder, target="latency=0.6", **{"latency.prompt": 10_000})


def test_a_table_that_is_given_is_not_timed_again(folder):
    model, adapter = skeleton(str(folder))
    sites = adapter.sites(model)
    curves = {
        site.shape: Curve((0, site.n_groups), (0, 1000), sum(other.shape == site.shape for other in sites))
        for site in sites
    }
    table = Prices(Workload(1, 8, 0), {}, 2000 * len(sites), 0.0, curves).as_dict()
    plan = plan_of(folder, target="latency=0.8", **{"latency.prices": table})
    assert [stage.name for stage in plan.stages if "time" in stage.name] == ["time the result"]


def test_the_models_to_be_timed_are_counted_by_what_they_keep(folder):
    model, adapter = skeleton(str(folder))
    sites = adapter.sites(model)
    most = 0
    for keeps in latency.trials(sites).values():
        dense = opened(str(folder), tokenizer=object(), dtype="float32", device="cpu")
        shared = {p.data_ptr() for p in dense.model.parameters()}
        small = latency.cut(dense, keeps)
        most = max(most, sum(p.nbytes for p in small.parameters() if p.data_ptr() not in shared))
    (timed,) = [s for s in plan_of(folder, target="latency=0.6", device="cpu").stages if s.name == "time sub-layers"]
    everything = sum(p.numel() for p in model.parameters()) * 4
    assert timed.memory == everything + (most + CUSHION) * (KEPT + 1) // KEPT


def test_what_cannot_fit_is_refused(folder, large, tmp_path):
    with pytest.raises(WrongInput, match=r"takes at least .* block by block .* are there"):
        plan_of(large, memory="1MB").check()
    plan = replace(plan_of(folder, tmp_path, memory="900GiB"), limit=900 * GIB)
    plan.check()
    with pytest.raises(WrongInput, match=r"this run writes .* the disk has 1,000 B free"):
        replace(plan, free_disk=1000).check()
    plan = plan_of(folder, tmp_path, **{"objective": "divergence", "data.search_tokens": 10**8})
    with pytest.raises(WrongInput, match=r"dense model alone .* the disk has .* or fewer search tokens"):
        replace(plan, limit=900 * GIB, free_disk=1000).check()
    with pytest.raises(WrongInput, match="no amount of memory"):
        plan_of(folder, memory="much")


def test_a_model_in_memory_is_never_paged(folder):
    parts = resolve(Recipe.load("fast").with_overrides({"memory": "1MB"}))
    model, adapter = tiny("llama"), adapter_for("llama")
    plan = make_plan(parts, model, adapter, None)
    assert not plan.paged
    assert plan.shares == Shares(None, 0, 0, 0, 0, 0)


def test_rates_are_measured(tmp_path):
    rates = Rates.measured(torch.device("cpu"), torch.float32, tmp_path)
    assert min(rates.flops, rates.read, rates.write) > 1e5
    assert not list(tmp_path.iterdir())
