"""Low rank through a whole run: exact ranks, the same bytes after a kill, two linear maps in what is saved."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import prunekit
from prunekit import Candidate, WrongInput
from prunekit.calibration.fill import build
from prunekit.data.spec import DataSpec
from prunekit.measure.evaluate import evaluate
from prunekit.models.adapters.find import adapter_for
from prunekit.models.classes import LowRank
from prunekit.plugins.adapter import UnsupportedModel
from prunekit.report.picture import removed_shares
from prunekit.run.export import export_model
from prunekit.search.ledger import Ledger
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.space.budgets import Budget
from prunekit.space.forms import RANKS, parse_form
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.system.memory import Shares
from prunekit.system.progress import Progress
from prunekit.testing import tiny, toy_supernet, toy_tokens
from prunekit.testing.supernets import KeepSpectrum
from prunekit_corner import Table
from prunekit_strategies.exporters.hf import HF

FILES = ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl")


def site_of(d_in, d_out, number=0):
    n = RANKS.most(d_in, d_in, d_out)
    return Site(
        f"s{number}", 0, "linear", n, 1, RANKS.each(d_in, d_out), d_out=d_out, form=RANKS, inputs=d_in
    )  # fmt: skip


# -- integers -------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_rank_never_costs_more_than_the_map_and_every_rank_that_costs_less_is_a_count(d_in, d_out):
    site = site_of(d_in, d_out)
    prices = [site.parameters(kept) for kept in range(site.least, site.n_groups + 1)]
    assert all(less < more for less, more in pairwise(prices))
    assert prices[-1] == d_in * d_out == site.parameters(site.n_groups)
    assert site.n_groups * (d_in + d_out) >= d_in * d_out, "the next rank would cost as much as the map, or more"
    assert (site.n_groups == 1) or site.n_groups - 1 < min(d_in, d_out)
    assert prices[:-1] == [r * (d_in + d_out) for r in range(1, site.n_groups)]


@given(st.lists(st.tuples(st.integers(2, 60), st.integers(2, 60)), min_size=1, max_size=6), st.integers(0, 100))
def test_a_budget_is_never_exceeded_and_no_further_rank_would_fit(shapes, percent):
    sites = tuple(site_of(d_in, d_out, number) for number, (d_in, d_out) in enumerate(shapes))
    full, least = (sum(s.parameters(count(s)) for s in sites) for count in (lambda s: s.n_groups, lambda s: s.least))
    share = (Fraction(percent, 100) * (full - least) + least) / full
    space = Space.whole(sites, Budget.keeping(share, sites))
    plan = space.uniform()
    assert space.cost(plan) <= space.budget.limit <= share * full
    for site, kept in zip(sites, plan, strict=True):
        if kept < site.n_groups:
            assert space.cost(plan) - site.parameters(kept) + site.parameters(kept + 1) > space.budget.limit


@pytest.mark.parametrize("shape", [(288, 288), (288, 768), (768, 288), (288, 96)])
def test_an_equal_share_is_the_published_rank(shape):
    site, (d_in, d_out) = site_of(*shape), shape
    for keep in (Fraction(8, 10), Fraction(7, 10), Fraction(1, 2)):
        published = int(d_in * d_out * keep / (d_in + d_out))
        (rank,) = Space.whole((site,), Budget.keeping(keep, (site,))).uniform()
        assert rank == published
    assert site_of(288, 288).describe(96) == "rank 96 of 288"
    assert site.describe(site.n_groups) == "dense"


# -- whole runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(saved_tiny, numbers):
    path = saved_tiny(intermediate_size=32)
    (path / "text.txt").write_text(numbers(4000))
    return path


@pytest.fixture(scope="module")
def pruned(quick):
    """A run."""

    def run(folder, output, **changes):
        settings = {"pruner": "svd-llm", "data__dataset": str(folder / "text.txt"), "structure": "low-rank"}
        return prunekit.prune(folder, output=output, **quick(**settings | changes))

    return run


@pytest.fixture(scope="module")
def searched(folder, tmp_path_factory, pruned):
    """An uninterrupted run that searches, at 40 %."""
    output = tmp_path_factory.mktemp("whole") / "out"
    pruned(folder, output, sparsity=0.4, code="bundled")  # verified
    return output


def test_ranks_are_exact_and_what_is_saved_are_two_linear_maps(folder, searched):
    report = json.loads((searched / "report.json").read_text())
    model, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (searched, folder))
    gone = 0
    for site in report["sites"]:
        here, before = model.get_submodule(site["name"]), dense.get_parameter(f"{site['name']}.weight")
        if site["kept"] == site["groups"]:
            assert site["keeps"] == "dense"
            assert torch.equal(here.get_parameter("weight"), before)
            continue
        assert isinstance(here, LowRank)
        assert [type(part) for part in here] == [torch.nn.Linear] * 2
        assert site["keeps"] == f"rank {here.rank} of {min(before.shape)}"
        assert here.rank == site["kept"]
        assert sum(p.numel() for p in here.parameters()) == site["parameters"] < before.numel()
        gone += before.numel() - site["parameters"]
    pruned, blocks = report["pruned"], report["dense"]["block_parameters"]
    assert gone == report["dense"]["parameters"] - pruned["parameters"] == blocks - pruned["block_parameters"]
    assert report["budget"]["spent"] <= report["budget"]["limit"]
    assert 0.4 <= gone / blocks < 0.405, "never fewer than asked, and less than the last rank more"
    assert len({site["kept"] / site["groups"] for site in report["sites"]}) > 1, "the search moved something"
    assert json.loads((searched / "config.json").read_text())["model_type"] == "prunekit_llama"
    assert "weights" not in report
    assert max(max(shares.values()) for shares in removed_shares(report["sites"]).values()) < 1
    rank = next(site["keeps"] for site in report["sites"] if site["keeps"] != "dense")
    card = (searched / "README.md").read_text()
    assert f"| {rank} |" in card
    assert "| site | kept rank | relative output error |" in card
    assert f"{gone / blocks:.1%} of the block parameters removed" in card


@pytest.mark.parametrize("when", [pytest.param("walk", marks=pytest.mark.slow), "search"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, searched, tmp_path, killed_at, when, pruned):
    place, name, last = {"walk": (CandidateStore, "put", 9), "search": (Ledger, "answer", 5)}[when]
    options = {"sparsity": 0.4, "code": "bundled", "verify": False}
    with killed_at(place, name, last):
        pruned(folder, tmp_path / "out", **options)
    pruned(folder, tmp_path / "out", **options)
    for file in FILES:
        mine, theirs = ((where / file).read_bytes() for where in (tmp_path / "out", searched))
        assert mine.replace(b"verify: false", b"verify: true") == theirs, file


@pytest.mark.slow
def test_evaluation_reads_what_was_saved(folder, searched):
    data = DataSpec(dataset=str(folder / "text.txt"), evaluation_tokens=512, seqlen=32)
    found, report = evaluate(str(searched), data), json.loads((searched / "report.json").read_text())
    assert found["parameters"] == report["pruned"]["parameters"]
    assert found["perplexity"] > 1


def test_formats_that_know_nothing_of_factors_are_refused_and_the_folder_is_the_model(searched, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_bytes((searched / name).read_bytes())
    for source in (searched, tmp_path / "bare"):
        with pytest.raises(WrongInput, match="does not know structure low-rank; it knows groups, n:m, weights"):
            export_model(str(source), [Table()])
    export_model(str(searched), [HF()], tmp_path / "again")
    one, two = ((path / "model.safetensors").read_bytes() for path in (searched, tmp_path / "again"))
    assert one == two


def test_without_a_search_the_table_is_priced_at_once_and_ranks_follow_the_fisher_table(folder, tmp_path, pruned):
    table = {"name": "table", "table": "fisher", "stride": 0.05, "candidates": 1}
    options = {"allocator": table, "carry": "centre", "damping": 0.01, "verify": False}
    result = pruned(folder, tmp_path / "out", sparsity=0.3, **options)
    assert len({site["kept"] / site["groups"] for site in result.report["sites"]}) > 3
    assert result.report["budget"]["removed"] >= 0.3


def test_a_model_already_of_low_rank_is_refused_in_a_sentence(searched, tmp_path, pruned):
    with pytest.raises(WrongInput, match="_proj is LowRank; prune before quantizing, factoring or wrapping"):
        pruned(searched, tmp_path / "out", data__dataset=str(searched / "README.md"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruner": "obs"}, "pruner 'obs' does not know structure low-rank; it knows groups"),
        ({"structure": "groups"}, "pruner 'svd-llm' does not know structure groups; it knows low-rank"),
        ({"allocator": "global-rank"}, "allocator 'global-rank' ranks groups"),
        ({"finishers": "bias"}, "finisher 'bias' does not know structure low-rank"),
        ({"finishers": "alternating"}, "finisher 'alternating' does not know structure low-rank"),
        ({"target": "kv-cache=0.5"}, "structure low-rank frees nothing in kv-cache"),
        ({"target": "latency=0.5"}, "of low rank no map was timed; latency goes with structure groups"),
        ({"apart": True}, "apart gives attention and MLP each their share of groups"),
    ],
)
def test_what_does_not_go_with_ranks_is_refused_before_any_work(folder, tmp_path, pruned, changes, message):
    with pytest.raises(WrongInput, match=message):
        pruned(folder, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_families_without_a_class_of_low_rank_are_refused_in_a_sentence():
    with pytest.raises(UnsupportedModel, match="type 'mamba' have no class whose linear maps may be two of low rank"):
        adapter_for("mamba").sites_of(tiny("mamba"), RANKS)


@pytest.mark.parametrize("metric", ["bytes", "flops"])
def test_metrics_that_count_parameters_count_those_of_factors(folder, tmp_path, pruned, metric):
    options = {"allocator": "uniform", "target": f"{metric}=0.7", "verify": False}
    report = pruned(folder, tmp_path / "out", **options).report
    assert report["budget"]["spent"] <= report["budget"]["limit"]
    assert 0.3 <= report["pruned"]["sparsity_of_blocks"] < 0.32


# -- parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda c: Candidate(None, c.weight), r"factors of shapes \[\(24, 5\), \(5, 24\)\] were asked, not None"),
        (lambda c: Candidate((0,), c.weight, c.factors), "without groups was asked"),
        (lambda c: Candidate(None, c.weight, (c.factors[0][:, :4], c.factors[1][:4])), "factors of shapes"),
        (lambda c: Candidate(None, c.weight, (c.factors[0] * torch.nan, c.factors[1])), "a factor of rank 5"),
    ],
    ids=["none", "groups", "rank", "nan"],
)
def test_a_pruner_that_breaks_its_promise_is_named(tmp_path, broken, message):
    class Broken(KeepSpectrum):
        def prune(self, layer, keeps):
            return [broken(candidate) for candidate in super().prune(layer, keeps)]

    net = toy_supernet(structure="low-rank")
    space = replace(net.space, ladders=((5,), *((site.n_groups,) for site in net.space.sites[1:])))
    with pytest.raises(prunekit.PluginError, match=f"Broken on model.layers.0.self_attn.q_proj: .*{message}"):
        build(
            net.model, net.adapter, space, tuple(ladder[0] for ladder in space.ladders), Broken(), toy_tokens(),
            CandidateStore(tmp_path, {}), progress=Progress(),
        )  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "phi3"])
def test_the_supernet_answers_as_the_assembled_model_and_that_as_the_products(model_type, monkeypatch):
    net, tokens = toy_supernet(model_type, structure="low-rank"), toy_tokens()
    monkeypatch.setattr(net, "shares", Shares(parts=0))
    start = net.space.uniform()
    others = [net.space.nearest([k + (i % 3 - 1) for i, k in enumerate(start)]), start]
    net.prefetch([start, *others], [tokens])
    for plan in (start, *others):
        logits = torch.cat([part for _, part in net.logits(plan, tokens)])
        with torch.no_grad():
            expected = net.assemble(plan)(tokens.ids, use_cache=False).logits.float()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_what_is_judged_and_stored_is_the_product_of_the_factors_that_are_saved(tmp_path, dtype):
    net = toy_supernet(structure="low-rank")
    space = net.space.zoomed(net.space.uniform(), reach=0)
    store = CandidateStore(tmp_path, {})
    errors = build(
        net.model, net.adapter, space, space.uniform(), KeepSpectrum(), toy_tokens(), store, dtype=dtype,
        progress=Progress(),
    )  # fmt: skip
    small = Supernet(net.model, net.adapter, space, errors, store)
    for site, (kept,) in zip(space.sites, space.ladders, strict=True):
        found = store.get(site, kept)
        assert found.factors is not None
        assert [factor.dtype for factor in found.factors] == [dtype] * 2
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(found.weight, found.factors[0].to(wide) @ found.factors[1].to(wide))
        size = sum(t.nbytes for t in found.factors)
        assert size <= CandidateStore.bytes(site, (kept,), dtype) < size + 4096
    v = small.assemble(space.uniform()).model.layers[0].self_attn.q_proj.v.weight
    factors = store.get(space.sites[0], space.ladders[0][0]).factors
    assert factors is not None
    assert torch.equal(v.to(dtype), factors[1])


def test_structures_are_known_by_name():
    assert parse_form("low-rank") is RANKS
