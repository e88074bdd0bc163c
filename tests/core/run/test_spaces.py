"""Which sites a recipe opens, and under which budget."""

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import prunekit
from prunekit.errors import WrongInput
from prunekit.layer.knapsack import Knapsack
from prunekit.layer.layouts import layout_of
from prunekit.models.adapters.find import adapter_for
from prunekit.models.modules import hollow
from prunekit.plugins.registry import ALLOCATORS
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.recipe.specs import SpareSpec
from prunekit.run.spaces import expert_spaces, in_multiples, sparing, whole_space
from prunekit.space.budgets import Budget
from prunekit.space.forms import GROUPS
from prunekit.space.ladders import Space
from prunekit.testing.models import tiny
from prunekit.testing.spaces import sites_of


def opened(overrides):
    model = tiny("llama", num_hidden_layers=4, intermediate_size=16)
    adapter = adapter_for("llama")
    parts = resolve(Recipe.load("default").with_overrides({"model": "nowhere", **overrides}))
    return whole_space(parts, model, adapter, torch.float32)


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5])
def test_uniform_takes_from_open_blocks_what_the_spared_ones_keep(share):
    sites = sparing(sites_of(8, attention=(64, 4), mlp=(512, 3)), 8, 1, 1)
    space = Space.whole(sites, Budget.keeping(1 - Fraction(str(share)), sites))
    uniform = space.uniform()
    whole = [i for i, site in enumerate(sites) if site.block in (0, 7)]
    assert [uniform[i] for i in whole] == [sites[i].n_groups for i in whole]
    assert space.budget.limit - 3 < space.cost(uniform) <= space.budget.limit  # tight: no neuron more fits
    local = share * 8 / 6  # r = S Σ all / Σ open
    for i, kept in enumerate(uniform):
        if i not in whole:
            assert 1 - kept / sites[i].n_groups == pytest.approx(local, abs=1 / 64)


def test_a_budget_that_open_blocks_cannot_meet_is_refused_in_a_sentence():
    sites = sparing(sites_of(4, attention=(4, 10), mlp=(16, 3)), 4, 1, 1)
    with pytest.raises(WrongInput, match=r"sparsity 0.6 of parameters cannot be met: reachable is 0 to 0.5, because"):
        Budget.keeping(Fraction("0.4"), sites)
    with pytest.raises(WrongInput, match="3 first and 1 last of 4 blocks leave none to prune"):
        sparing(sites, 4, 3, 1)


@pytest.mark.parametrize("structure", ["groups", "weights", "2:4", "low-rank"])
def test_spared_blocks_have_one_count_and_the_budget_is_of_all(structure):
    extra = {} if structure == "2:4" else {"sparsity": 0.3}
    pruner = "svd-llm" if structure == "low-rank" else "magnitude"
    recipe = {"structure": structure, "pruner": pruner, "allocator": "uniform", **extra}
    plain, spared = opened(recipe), opened({**recipe, "spare": {"first": 1, "last": 1}})
    for site, ladder in zip(spared.sites, spared.ladders, strict=True):
        assert (ladder == (site.n_groups,)) == (site.block in (0, 3))
    if structure != "2:4":
        assert spared.budget == plain.budget
        return
    # a pattern is that of the others: they keep half, the spared ones all
    assert [k * 2 for k in spared.uniform()] == [s.n_groups * (4 if s.spared else 2) // 2 for s in spared.sites]


@pytest.mark.parametrize("extra", [{}, {"apart": True}, {"of": "model"}, {"metric": "flops"}], ids=str)
def test_maps_beside_mlps_are_paid_for_before_the_search(extra):
    wanted = {"pruner": "magnitude", "allocator": "uniform", "finishers": []} | extra
    added = 3 * 2 * 1 * 24 * (2 if "metric" in extra else 1)  # three MLPs of four, a rank of 1 in a stream of 24
    plain = opened(wanted)
    patched = opened(wanted | {"finishers": ["linear-patch"]})
    assert patched.sites == plain.sites
    assert patched.budget.limit == plain.budget.limit - added
    assert patched.budget.outside == plain.budget.outside + added
    assert patched.budget.dense == plain.budget.dense
    limits = [dict(space.budget.by_kind) for space in (plain, patched)]
    if "apart" in extra:
        assert limits[1] == {"attention": limits[0]["attention"], "mlp": limits[0]["mlp"] - added}
    assert patched.cost(patched.uniform()) <= patched.budget.limit


def test_maps_that_leave_too_little_are_refused():
    spec = {"name": "linear-patch", "rank": 0.45}
    with pytest.raises(WrongInput, match=r"a recovery step adds 1,440 parameters, which leaves -?[\d,]+ of the budget"):
        opened({"pruner": "magnitude", "allocator": "uniform", "sparsity": 0.9, "finishers": [spec]})


def test_a_model_with_a_map_beside_an_mlp_is_not_pruned_again():
    model, adapter = tiny("llama"), adapter_for("llama")
    site = adapter.sites(model)[1]
    adapter.add_patch(adapter.blocks(model)[0], site, torch.ones(24, 1), torch.ones(1, 24))
    parts = resolve(Recipe.load("default").with_overrides({"model": "nowhere"}))
    with pytest.raises(WrongInput, match=r"has a linear map beside it, .* prune the model that it was made from"):
        whole_space(parts, model, adapter, torch.float32)


def test_equal_sizes_and_spared_blocks_do_not_go_together():
    sites = sparing(sites_of(4, attention=(4, 10), mlp=(16, 3)), 4, 1, 1)
    space = Space.whole(sites, Budget.keeping(Fraction("0.7"), sites))
    with pytest.raises(WrongInput, match="equal: true wants one count for all sites of a kind, and `spare` keeps some"):
        ALLOCATORS.build({"name": "uniform", "equal": True}).first_space(space)


def test_a_spared_kind_keeps_everything_and_the_others_their_share():
    sites = sparing(sites_of(4, attention=(4, 10), mlp=(16, 3)), 4, 0, 0, ["attention", "experts"])
    assert [site.spared for site in sites] == [site.kind == "attention" for site in sites]
    together, apart = (Budget.keeping(Fraction("0.75"), sites, apart=apart) for apart in (False, True))
    assert together.limit == (4 * 40 + 4 * 48) * 3 // 4, "the budget is of all, so MLPs lose more"
    assert dict(apart.by_kind) == {"attention": 4 * 40, "mlp": 4 * 36}
    equal = ALLOCATORS.build({"name": "uniform", "equal": True})
    kept = [ladder[0] for ladder in equal.first_space(Space.whole(sites, apart)).ladders]
    assert kept == [4, 12] * 4
    with pytest.raises(WrongInput, match=r"spare\.kinds: attention, mlp leave nothing to prune"):
        sparing(sites, 4, 0, 0, ["attention", "mlp"])


def test_ends_are_numbers_of_blocks_or_shares_of_them():
    assert SpareSpec(first=0.125, last=0.0625).of(32) == (4, 2)
    assert SpareSpec(first=0.125, last=0.0625).of(8) == (1, 1)
    assert SpareSpec(first=3, last=0).of(8) == (3, 0)
    with pytest.raises(
        WrongInput, match=r"spare\.first: blocks are a whole number, or a share of all below 1, not 1\.5"
    ):
        Recipe.load("default").with_overrides({"spare.first": 1.5})


def test_a_recipe_that_spares_nothing_says_nothing_of_it():
    assert "spare" not in Recipe.load("default").to_yaml()
    assert "first: 0.125" in Recipe.load("llm-pruner").to_yaml()


@given(st.integers(2, 40), st.sampled_from([0.1, 0.3, 0.5, 0.7]), st.integers(41, 99))
def test_neurons_stay_in_multiples_or_all_or_none_and_the_budget_holds(multiple, share, neurons):
    sites = in_multiples(sites_of(4, attention=(6, 40), mlp=(neurons, 3)), multiple)
    space = Space.whole(sites, Budget.keeping(1 - Fraction(str(share)), sites))
    for site, ladder in zip(sites, space.ladders, strict=True):
        counts = {*range(0, neurons, multiple), neurons} if site.kind == "mlp" else set(range(7))
        assert set(ladder) == counts
    knapsack = Knapsack(space)
    wanted = torch.cat([torch.linspace(1 + i, i, n, dtype=torch.float64) for i, n in enumerate(knapsack.sizes)])
    learned = knapsack.counts(knapsack.project(wanted))
    for found in (space.uniform(), space.zoomed(space.uniform(), 0.1).uniform(), learned):
        assert space.is_feasible(found)  # every count a rung, never more than the budget


@pytest.mark.parametrize("recipe", ["default", "grasprune", {"allocator": "global-rank", "pruner": "wanda"}])
def test_what_is_built_has_them_too(recipe, saved_tiny, quick):
    recipe = {"recipe": recipe} if isinstance(recipe, str) else recipe
    made = prunekit.prune(saved_tiny(), verify=False, multiple_of=4, **quick(**recipe))
    kept = [site["kept"] for site in made.report["sites"] if site["kind"] == "mlp"]
    assert all(count % 4 == 0 or count == 17 for count in kept)
    assert made.report["budget"]["removed"] >= made.recipe.sparsity


def test_neurons_of_experts_stay_in_multiples_too_and_what_always_stays_is_one():
    """Of 32 neurons in steps of eight, and of a shared expert of 7 that keeps one at least."""
    model, adapter = tiny("qwen2_moe", moe_intermediate_size=32), adapter_for("qwen2_moe")
    found = in_multiples(adapter.sites_of(model, GROUPS, experts="neurons"), 16)
    metric = Budget(0)
    inside = next(site for site in found if site.experts)
    assert ([*metric.counts(inside)], inside.least) == ([2, 4], 2)
    found = in_multiples(adapter.sites(model), 4)
    shared = next(site for site in found if site.name.endswith("expert.down_proj"))
    assert ([*metric.counts(shared)], shared.least) == ([4, 7], 4)


def test_multiples_that_cannot_be_are_refused_in_a_sentence():
    with pytest.raises(WrongInput, match="multiple_of=64, and the MLPs have at most 16 neurons"):
        in_multiples(sites_of(4, attention=(4, 10), mlp=(16, 3)), 64)
    with pytest.raises(
        WrongInput, match="multiple_of is of the neurons that an MLP keeps; it goes with structure groups"
    ):
        opened(
            {"structure": "weights", "pruner": "magnitude", "allocator": "uniform", "sparsity": 0.3, "multiple_of": 4}
        )
    assert "multiple_of" not in Recipe.load("default").to_yaml()


@pytest.mark.parametrize(
    ("family", "share", "part"), [("mixtral", 0.4, 0.5), ("qwen2_moe", 0.3, 0.8), ("gpt_oss", 0.5, 0.7)]
)
def test_whole_experts_that_go_first_leave_prices_that_add_up_to_the_budget(family, share, part):
    """As many as fit go; the counts of the rest may spend all that is left of the budget of the dense model."""
    model, adapter = tiny(family, intermediate_size=16).requires_grad_(False), adapter_for(family)
    options = {"experts": "both", "sparsity": share, "experts_share": part, "pruner": "wanda", "allocator": "uniform"}
    parts = resolve(Recipe.load().with_overrides(options))
    first, rest = expert_spaces(parts, model, adapter, torch.float32)
    blocks = sum(p.numel() for p in adapter.blocks(model).parameters())
    assert rest.budget.dense == blocks
    assert rest.budget.limit + rest.budget.outside == int(blocks * (1 - Fraction(str(share))))
    each = sum(site.params_per_group for site in first.sites if site.kind == "experts")
    fewer = int(Fraction(str(part)) * (blocks - rest.budget.limit - rest.budget.outside)) // each
    assert {(s.kind, s.n_groups - kept) for s, (kept,) in zip(first.sites, first.ladders, strict=True)} == {
        (s.kind, fewer if s.kind == "experts" else 0) for s in first.sites
    }
    assert fewer > 0
    small = copy.deepcopy(model)
    for site, (kept,) in zip(first.sites, first.ladders, strict=True):
        if site.kind == "experts":
            weight = torch.ones(1, site.n_groups)
            adapter.remove(small, site, layout_of(site).stand_in(site, kept, weight))
    left = sum(p.numel() for p in adapter.blocks(small).parameters())
    assert left == blocks - fewer * each
    assert left == rest.budget.outside + sum(site.parameters(site.n_groups) for site in rest.sites)
    assert rest.sites == adapter.sites_of(small, GROUPS, experts="neurons")
    assert (first, rest) == expert_spaces(parts, hollow(model), adapter, torch.float32), "of shapes alone"
    assert whole_space(parts, model, adapter, torch.float32) == rest
