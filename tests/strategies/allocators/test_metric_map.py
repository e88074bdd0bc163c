import math
from dataclasses import replace

import pytest

from prunekit.plugins.registry import ALLOCATORS
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.testing import converse
from prunekit.testing.spaces import convex_table, problem, small_llama
from prunekit_strategies.allocators.metric_map import (
    OWL,
    SPREADS,
    AlphaPruning,
    ErrorMap,
    MetricMap,
    mean_errors,
    to_unit,
)
from prunekit_strategies.signals.influence import Influence

BLOCKS = [0.3, 0.9, 0.1, 0.5, 0.2, 0.8, 0.4, 0.6]  # a signal that is the same in both sub-layers


def toy(share=0.5, values=None):
    """Eight blocks, every count on every ladder."""
    found = problem(small_llama(share))
    return replace(found, signals=(tuple(values or [v for v in BLOCKS for _ in range(2)]),))


def shares(plugin, given, spread):
    wish = plugin.wish(given, spread)
    return [1 - w / s.n_groups for w, s in zip(wish, given.space.sites, strict=True)]


def mean(removed, given):
    space = given.space
    prices = [space.budget.price(s, s.n_groups) for s in space.sites]
    return sum(p * r for p, r in zip(prices, removed, strict=True)) / sum(prices)


def test_owl_spans_twice_lambda_and_keeps_the_mean():
    given = toy(share=0.3)
    removed = shares(OWL(), given, 0.16)
    assert max(removed) - min(removed) == pytest.approx(0.16, abs=1e-12)
    assert mean(removed, given) == pytest.approx(0.7, abs=1e-6)  # the budget is a whole number of parameters
    assert (max(removed) + min(removed)) / 2 != pytest.approx(0.7, abs=1e-3)  # not centred
    assert removed[4] == max(removed)  # block 2 has the fewest outliers
    by_hand = [2 * 0.08 * (v - 0.1) / 0.8 for v in BLOCKS]
    by_hand = [1 - (k + 0.3 - sum(by_hand) / 8) for k in by_hand]
    assert removed[::2] == pytest.approx(by_hand, abs=1e-6)


def test_alpha_pruning_scales_by_one_plus_minus_epsilon_and_keeps_the_mean():
    given = toy(share=0.5)
    removed = shares(AlphaPruning(), given, 0.4)
    assert max(removed) / min(removed) == pytest.approx(1.2 / 0.8)
    assert mean(removed, given) == pytest.approx(0.5, abs=1e-6)
    assert removed[2] == max(removed)  # the lightest tail, the largest exponent
    factors = [0.4 * (v - 0.1) / 0.8 + 0.8 for v in BLOCKS]
    assert removed[::2] == pytest.approx([0.5 * f * 8 / sum(factors) for f in factors], abs=1e-6)


def test_what_would_lose_more_than_all_is_brought_back_to_the_budget():
    given = toy(share=0.1)
    wish = AlphaPruning(spread=1.0).wish(given, 1.0)
    assert min(wish) == 0  # cut off
    answer = converse(AlphaPruning(spread=1.0, compete=False), given).answer
    assert given.space.cost(answer) <= given.space.budget.limit
    assert given.space.nearest(answer) == answer  # tight


def test_the_answer_is_within_a_rung_of_the_map():
    given = toy()
    answer = converse(OWL(compete=False), given).answer
    for kept, wished, site in zip(answer, OWL().wish(given, 0.16), given.space.sites, strict=True):
        assert abs(kept - wished) <= 0.51 + 0.01 * site.n_groups


def test_a_block_has_the_mean_of_its_sites_by_parameters():
    values = [v + d for v in BLOCKS for d in (0.09, -0.09 * 4 * 49_152 / (768 * 768))]
    assert MetricMap().standing(toy(values=values)) == pytest.approx(MetricMap().standing(toy()))


def test_kinds_are_told_apart_and_sites_are_not():
    values = [v + d for v in BLOCKS for d in (0.0, 100.0)]
    by_kind = MetricMap(per="kind").standing(toy(values=values))
    assert by_kind[::2] == pytest.approx(by_kind[1::2])
    by_site = MetricMap(per="site").standing(toy(values=values))
    assert max(by_site[::2]) < min(by_site[1::2])


def test_low_is_high_upside_down():
    given = toy()
    high, low = MetricMap().standing(given), MetricMap(keep="low").standing(given)
    assert [h + k for h, k in zip(high, low, strict=True)] == pytest.approx([1] * 16)


@pytest.mark.parametrize("scale", ["range", "rank", "sigmoid"])
def test_every_map_keeps_the_order_and_ignores_unit_and_origin(scale):
    values = [0.3, -2.0, 0.31, 7.0, 0.3]
    x = to_unit(values, scale)
    assert sorted(range(5), key=values.__getitem__) == sorted(range(5), key=x.__getitem__)
    assert x[0] == x[4]
    assert 0 <= min(x) <= max(x) <= 1
    assert to_unit([5 + 3 * v for v in values], scale) == pytest.approx(x)
    assert to_unit([2.0, 2.0, 2.0], scale) == [0.5] * 3


def test_ranks_are_evenly_spread_and_ties_share_their_places():
    assert to_unit([0.1, 90.0, 5.0], "rank") == [0, 1, 0.5]
    assert to_unit([1.0, 2.0, 2.0, 3.0], "rank") == [0, 0.5, 0.5, 1]


def test_sigmoid_is_that_of_the_z_score():
    values = [1.0, 2.0, 6.0]
    deviation = math.sqrt(sum((v - 3) ** 2 for v in values) / 3)
    assert to_unit(values, "sigmoid") == pytest.approx([1 / (1 + math.exp(-(v - 3) / deviation)) for v in values])


def test_equal_numbers_are_uniform():
    given = toy(values=[0.4] * 16)
    assert converse(MetricMap(compete=False), given).answer == given.start


def test_the_objective_chooses_spread_and_start():
    given = toy()
    talk = converse(MetricMap(spread=None), given)
    assert given.start in talk.asked
    assert len(talk.asked) <= 1 + len(SPREADS)
    against = converse(MetricMap(), given, lambda a: float(a != given.start))
    assert against.answer == given.start
    alone = converse(MetricMap(compete=False), given, lambda a: float(a != given.start))
    assert alone.answer != given.start


def test_the_ladders_reach_as_far_as_the_map():
    whole = small_llama()
    space = OWL().first_space(whole)
    coarse = replace(toy(), space=space, errors=convex_table(space), start=space.uniform())
    assert coarse.start == whole.uniform()
    answer = converse(OWL(compete=False), coarse).answer
    for kept, wished, site in zip(answer, OWL().wish(coarse, 0.16), space.sites, strict=True):
        assert abs(kept - wished) <= max(1, 0.5 * 0.02 * site.n_groups) + 0.01 * site.n_groups


def test_errors_at_the_mean_share_are_read_between_the_rungs():
    sites = tuple(Site(str(i), i, "mlp", 8, 1, 1) for i in range(2))
    space = Space(sites, ((0, 4, 8), (0, 2, 6, 8)), Budget(8))
    given = replace(problem(space, ((1.0, 0.4, 0.0), (1.0, 0.6, 0.2, 0.0))), start=(4, 4))
    assert mean_errors(given) == pytest.approx([0.4, 0.4])
    assert mean_errors(replace(given, start=(4, 2))) == pytest.approx([0.55, 0.5])


def test_the_error_map_keeps_more_of_what_loses_more():
    given = problem(small_llama())
    errors = mean_errors(given)
    wish = ErrorMap().wish(given, 0.2)
    attention = range(0, 16, 2)
    assert sorted(attention, key=errors.__getitem__) == sorted(attention, key=wish.__getitem__)
    assert ErrorMap().signals == ()


def test_signals_are_named_in_recipes():
    built = ALLOCATORS.build({"name": "metric-map", "signal": "influence", "spread": 0.3})
    assert built.signals == (Influence(),)
    assert ALLOCATORS.build(ALLOCATORS.spec(built)) == built
