"""A budget in time, from a price table."""

from collections.abc import Sequence

import pytest

from prunekit import Budget, Site, Space, WrongInput
from prunekit.testing.spaces import sites_of, timed
from prunekit_strategies.metrics.latency import Latency


def priced(sites: Sequence[Site]) -> Latency:
    return Latency(prices=timed(sites).as_dict())


def test_a_table_is_a_budget_in_whole_nanoseconds() -> None:
    sites = sites_of(2, attention=(4, 10), mlp=(16, 3))
    table = timed(sites)  # attention 0, 30, 40, 50, 60; MLP in tiles of 4: 0, 30, 50, 70, 90; 80 outside
    assert table.dense == 2 * 60 + 2 * 90 + 80 == 380
    budget = Budget.keeping(0.7, sites, metric=priced(sites))
    assert budget.limit == 266 - 80
    space = Space.whole(sites, budget)
    assert space.ladders[:2] == ((0, 1, 2, 3, 4), (0, 4, 8, 12, 16))
    assert [budget.price(sites[1], k) for k in (0, 1, 4, 5, 16)] == [0, 30, 30, 50, 90]  # 1 costs as much as 4
    assert space.cost(space.nearest((2, 8, 2, 8))) <= 186


def test_a_table_does_not_trade_between_kinds_where_these_are_apart() -> None:
    sites = sites_of(2, attention=(4, 10), mlp=(16, 3))
    budget = Budget.keeping(0.7, sites, metric=priced(sites), apart=True)
    assert budget.by_kind == (("attention", 74), ("mlp", 111))  # 186 of 300, of 120 and 180


def test_a_table_says_which_targets_can_be_reached() -> None:
    sites = sites_of(2, attention=(4, 10), mlp=(16, 3))
    lowest = Budget.keeping(0.2106, sites, metric=priced(sites))  # 80 of 380: all dropped
    assert lowest.limit == 0
    with pytest.raises(WrongInput, match=r"latency=0\.2105 cannot be met: reachable is 0\.2106 to 1"):
        Budget.keeping(0.2105, sites, metric=priced(sites))


def test_a_table_of_another_model_is_refused() -> None:
    sites = sites_of(2, attention=(4, 10), mlp=(16, 3))
    other = sites_of(2, attention=(4, 10), mlp=(16, 4))
    with pytest.raises(WrongInput, match=r"no mlp: 16 groups of 1 columns and 3 parameters, as 0\.mlp is"):
        Budget.keeping(0.7, sites, metric=priced(other))
    with pytest.raises(WrongInput, match="another number of sub-layers"):
        Budget.keeping(0.7, sites[:2], metric=priced(sites))
    with pytest.raises(WrongInput, match="no prices but those of a table"):
        Budget.keeping(0.7, sites, metric=Latency())


def test_a_table_brings_its_workload() -> None:
    sites = sites_of(2, attention=(4, 10), mlp=(16, 3))
    metric = priced(sites)
    assert (metric.batch, metric.prompt, metric.new_tokens) == (1, 8, 0)
    assert metric.table == timed(sites)
    with pytest.raises(WrongInput, match=r"of prompt 8, and latency\.prompt is 9; measure anew"):
        Latency(prompt=9, prices=metric.prices)
    with pytest.raises(ValueError, match="at least one prompt"):
        Latency(batch=0)


def test_zeros_save_no_time() -> None:
    with pytest.raises(WrongInput, match="zeros are multiplied like other numbers"):
        Latency().check("weights")
    Latency().check("groups")
