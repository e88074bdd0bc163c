import random
from dataclasses import replace
from itertools import pairwise, product

import pytest

from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.testing import best_allocation, converse
from prunekit.testing.allocators import furnished
from prunekit.testing.spaces import problem, sites_of, small_llama
from prunekit_strategies.allocators.global_rank import FINE, GlobalRank, normal

SUM = GlobalRank(normalise="none", most=1.0, compete=False)


def scored(sites, budget, scores):
    """A problem whose errors are the sums of the scores of what is removed: separable."""
    space = Space.whole(sites, budget)
    errors = tuple(tuple(sum(sorted(s)[: len(s) - k]) for k in range(len(s) + 1)) for s in scores)
    return replace(problem(space, errors), scores=tuple(map(tuple, scores)))


def drawn(sites, seed):
    rng = random.Random(seed)
    return [[rng.expovariate(1) for _ in range(s.n_groups)] for s in sites]


@pytest.mark.parametrize("seed", range(5))
def test_one_price_and_scores_that_add_up_is_the_best_of_all_subsets(seed):
    sites = tuple(Site(str(i), i, "mlp", 3, 1, 7) for i in range(4))
    given = scored(sites, Budget(5 * 7), drawn(sites, seed))
    units = [s for site in given.scores or () for s in site]
    best = min(
        sum(s for s, gone in zip(units, mask, strict=True) if gone)
        for mask in product((0, 1), repeat=12)
        if sum(mask) == 7
    )
    answer = converse(SUM, given).answer
    assert sum(answer) == 5
    assert sum(given.error(i, k) for i, k in enumerate(answer)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_score_per_price_is_optimal_wherever_the_cut_spends_the_budget(seed):
    sites = sites_of(3, attention=(4, 10), mlp=(8, 3))
    scores = drawn(sites, seed)
    order = sorted(
        (s / site.params_per_group, site.params_per_group)
        for site, some in zip(sites, scores, strict=True)
        for s in some
    )
    whole = sum(s.parameters(s.n_groups) for s in sites)
    for cut in (6, 14, 25):
        given = scored(sites, Budget(whole - sum(price for _, price in order[:cut])), scores)
        answer = converse(replace(SUM, per_price=True), given).answer
        assert given.space.cost(answer) == given.space.budget.limit
        optimum = best_allocation(given.space, given.errors)[1]
        assert sum(given.error(i, k) for i, k in enumerate(answer)) == pytest.approx(optimum)


def test_a_smaller_budget_removes_what_the_larger_one_did_and_more():
    kept = []
    for share in (0.8, 0.6, 0.4, 0.2):
        given = furnished(problem(small_llama(share)), GlobalRank(), seed=1)
        kept.append(GlobalRank().wish(given))
        assert given.space.cost(tuple(kept[-1])) <= given.space.budget.limit
    assert all(more >= less for one, two in pairwise(kept) for more, less in zip(one, two, strict=True))


def test_a_head_counts_as_many_neurons_as_it_costs():
    given = furnished(problem(small_llama(0.5)), GlobalRank(), seed=1)
    kept, space = GlobalRank().wish(given), given.space
    assert 0 <= space.budget.limit - space.cost(tuple(kept)) < 49_152  # less than the dearest unit is left


def test_no_site_goes_beyond_its_protected_share_unless_it_must():
    sites = tuple(Site(str(i), i, "mlp", 10, 1, 1) for i in range(3))
    weak = [[0.01 * (j + 1) for j in range(10)], [5.0 + j for j in range(10)], [5.0 + j for j in range(10)]]
    given = scored(sites, Budget(15), weak)
    assert SUM.wish(given)[0] == 0
    assert replace(SUM, most=0.9).wish(given)[0] == 1  # int(10 · 0.9), without a float in the way
    tiny = scored(sites, Budget(1), weak)
    assert sum(converse(replace(SUM, most=0.5), tiny).answer) == 1


def test_the_unit_of_a_sites_scores_does_not_matter_once_normalised():
    given = furnished(problem(small_llama()), GlobalRank(), seed=2)
    louder = tuple(tuple(1000.0**i * s for s in site) for i, site in enumerate(given.scores or ()))
    for plugin in (GlobalRank(), GlobalRank("l2", per_price=True)):
        assert plugin.wish(replace(given, scores=louder)) == plugin.wish(given)


def test_z_scores_and_norms():
    z = normal([1.0, 2.0, 6.0], "z-score")
    assert sum(z) == pytest.approx(0)
    assert sum(x * x for x in z) == pytest.approx(3)
    assert sum(x * x for x in normal([3.0, 4.0], "l2")) == pytest.approx(1)
    assert normal([2.0, 2.0], "z-score") == [0, 0]


def test_units_that_tell_nothing_go_evenly():
    given = furnished(problem(small_llama()), GlobalRank())
    flat = replace(given, scores=tuple((1.0,) * len(s) for s in given.scores or ()))
    shares = {k / s.n_groups for k, s in zip(GlobalRank().wish(flat), flat.space.sites, strict=True)}
    assert max(shares) - min(shares) <= 0.25  # one head


def test_the_start_stands_unless_the_objective_prefers_the_ranking():
    given = furnished(problem(small_llama()), GlobalRank())
    assert converse(GlobalRank(), given, lambda a: float(a != given.start)).answer == given.start
    assert converse(GlobalRank(), given, lambda a: float(a == given.start)).answer != given.start


def test_a_second_walk_tells_apart_what_coarse_rungs_round_away():
    whole = small_llama()
    coarse = GlobalRank().first_space(whole)
    fine = GlobalRank().next_space(coarse, coarse.uniform())
    assert fine is not None
    given = furnished(problem(fine), GlobalRank(), seed=3)
    answer = converse(GlobalRank(compete=False), given).answer
    for kept, wished, site in list(zip(answer, GlobalRank().wish(given), whole.sites, strict=True))[1::2]:
        assert abs(kept - wished) <= 0.5 * FINE * site.n_groups + 0.01 * site.n_groups
    assert GlobalRank().next_space(fine, answer) is None
