"""The shares of the released code, worked out by hand, under an exact budget."""

from dataclasses import replace

import pytest

from prunekit.space.budgets import Budget
from prunekit.space.forms import RANKS, Values
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.testing import converse
from prunekit.testing.spaces import problem, small_llama
from prunekit_strategies.allocators.olica import Olica

D, WIDTH, NEURONS = 256, 64, 700  # four heads; queries, keys, values and what reads them are D x D


def blocks(share: float, depth: int = 3) -> Space:
    sites = list[Site]()
    for block in range(depth):
        for name in ("q", "k"):
            most = RANKS.most(D, D, D)
            sites.append(Site(f"{block}.{name}", block, "linear", most, 1, 2 * D, d_out=D, form=RANKS, inputs=D))
        heads = Values(4, 4)
        sites.append(Site(f"{block}.o", block, "attention", WIDTH, 1, 8 * D, d_out=D, form=heads, inputs=D))
        sites.append(Site(f"{block}.down", block, "mlp", NEURONS, 1, 3 * D, d_out=D))
    return Space.whole(sites, Budget.keeping(share, sites))


@pytest.mark.parametrize(
    ("sparsity", "of_queries", "of_values"),
    [(0.2, 0.4, 0.1), (0.3, 0.6, 0.15), (0.5, 0.75, 0.25)],  # 2 s and s / 2; above 0.4 they are 1.5 s and s / 2
)
def test_shares_are_the_papers_and_the_mlps_pay_the_rest_to_the_unit(sparsity, of_queries, of_values):
    whole = blocks(1 - sparsity)
    space = Olica().first_space(whole)
    plan = converse(Olica(), problem(space)).answer
    assert whole.budget.limit - min(site.params_per_group for site in whole.sites) < space.cost(plan)
    assert space.cost(plan) <= whole.budget.limit
    total, attention, mlp = (n * 3 for n in (4 * D * D + 3 * D * NEURONS, 4 * D * D, 3 * D * NEURONS))
    rest = (sparsity * total - attention * (of_queries + of_values) / 2) / mlp
    gone = {"k": of_queries, "q": of_queries, "o": of_values, "down": rest}
    for site, kept in zip(whole.sites, plan, strict=True):
        assert kept / site.n_groups == pytest.approx(1 - gone[site.name.partition(".")[2]], abs=1.5 / 64)


def test_a_share_that_would_take_all_leaves_one_and_the_mlps_pay() -> None:
    whole = blocks(0.2)
    plan = converse(Olica(), problem(Olica().first_space(whole))).answer
    assert whole.is_feasible(plan)
    assert {kept for site, kept in zip(whole.sites, plan, strict=True) if site.kind == "linear"} <= {1, 2}


def test_without_narrower_heads_shares_are_uniform() -> None:
    assert Olica().first_space(small_llama()).ladders == ((2,), (384,)) * 8


def test_what_is_spared_stays_whole() -> None:
    space = blocks(0.7)
    sites = [replace(site, spared=site.block == 0) for site in space.sites]
    whole = Space.whole(sites, space.budget)
    plan = converse(Olica(), problem(Olica().first_space(whole))).answer
    assert all(kept == site.n_groups for site, kept in zip(sites, plan, strict=True) if site.spared)
