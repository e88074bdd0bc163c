"""Space and Budget: integers, exactly."""

from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.errors import WrongInput
from prunekit.search.exact import best_allocation
from prunekit.space.budgets import Budget
from prunekit.space.forms import Groups, Pattern, parse_form
from prunekit.space.ladders import Space
from prunekit.space.metrics import PARAMETERS, Metric
from prunekit.space.prices import Curve, Prices, Workload
from prunekit.space.sites import Kind, Site
from prunekit.testing.spaces import Cached, Tiles, convex_table, rough_table, sites_of, small_llama
from prunekit_strategies.metrics.formulas import Bytes, Flops, KVCache
from prunekit_strategies.metrics.latency import Latency

KINDS: tuple[Kind, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Stepped(Groups):
    """Groups that go some at a time."""

    by: int = 1
    lowest: int = 0  # steps

    def step(self, d_in: int) -> int:
        return self.by

    def least(self, d_in: int) -> int:
        return self.by * self.lowest


@st.composite
def spaces(draw: st.DrawFn, apart: bool | None = None) -> Space:
    """Up to five sites of uneven groups and prices, any reachable budget, whole or zoomed ladders."""
    sites = tuple(
        Site(
            f"s{i}",
            i,
            draw(st.sampled_from(KINDS)),
            n_groups=step * draw(st.integers(1, 24 // step)),
            group_size=1,
            params_per_group=draw(st.integers(1, 40)),
            params_fixed=draw(st.integers(0, 20)),
            form=Stepped(step, draw(st.integers(0, 1))),
        )
        for i, step in enumerate(draw(st.lists(st.sampled_from([1, 1, 3]), min_size=1, max_size=5)))
    )
    apart = draw(st.booleans()) if apart is None else apart
    ruler, limits = Budget(0), []
    if draw(st.booleans()):
        shapes = sorted({site.shape for site in sites})
        curves = {shape: draw(curves_of([s for s in sites if s.shape == shape])) for shape in shapes}
        ruler = Budget(0, Latency(prices=Prices(Workload(1, 8, 0), {}, 10**6, 0.0, curves).as_dict()))
    for kind in sorted({s.kind for s in sites}):
        some = [s for s in sites if s.kind == kind]
        least, full = (sum(ruler.price(s, k) for s, k in zip(some, ks, strict=True)) for ks in _ends(some))
        limits.append((kind, draw(st.integers(least, full + 5))))
    by_kind = tuple(limits) if apart else ()
    space = Space.whole(sites, replace(ruler, limit=sum(n for _, n in limits), by_kind=by_kind))
    if draw(st.booleans()):
        space = space.zoomed(space.uniform(), draw(st.sampled_from([1 / 2, 1 / 4, 1 / 8])), draw(st.integers(0, 8)))
    return space


def curves_of(sites: list[Site]) -> st.SearchStrategy[Curve]:
    """Prices of one shape that rise as they like, of some counts that all its sites have, all groups among them."""
    full, step = sites[0].n_groups, max(site.step for site in sites)
    inner = st.sets(st.integers(0, full // step).map(lambda k: k * step), max_size=6)

    def priced(counts: set[int]) -> st.SearchStrategy[Curve]:
        rises = st.lists(st.integers(1, 40), min_size=len(counts), max_size=len(counts))
        return rises.map(lambda up: Curve(tuple(sorted(counts)), tuple(accumulate(up)), 1))

    return inner.map(lambda counts: counts | {full}).flatmap(priced)


def _ends(sites: list[Site]) -> tuple[list[int], list[int]]:
    return [s.least for s in sites], [s.n_groups for s in sites]


def wishes(space: Space) -> st.SearchStrategy[list[float]]:
    """Quarters of a group, so that a common shift by halves of a site is exact."""
    return st.lists(st.integers(-100, 200).map(lambda x: x / 4), min_size=len(space.sites), max_size=len(space.sites))


def is_tight(space: Space, allocation: tuple[int, ...]) -> bool:
    """No site can be raised by one rung."""
    rungs = space.rungs(allocation)
    raised = (
        space.allocation((*rungs[:i], r + 1, *rungs[i + 1 :]))
        for i, r in enumerate(rungs)
        if r + 1 < len(space.ladders[i])
    )
    return not any(space.is_feasible(a) for a in raised)


@given(st.data())
def test_nearest_is_feasible_tight_and_its_own_nearest(data: st.DataObject) -> None:
    space = data.draw(spaces())
    found = space.nearest(data.draw(wishes(space)))
    assert space.is_feasible(found)
    assert is_tight(space, found)
    assert space.nearest(found) == found


@given(st.data())
def test_a_common_shift_is_the_same_wish(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([4, 8, 16]))  # powers of two: shares add without rounding
    prices = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    sites = [Site(str(i), i, "mlp", groups, 1, p) for i, p in enumerate(prices)]
    space = Space.whole(sites, Budget(data.draw(st.integers(0, groups * sum(prices)))))
    # distinct wishes: equal ones tie, and where a tie breaks may depend on the last bit
    wish = data.draw(
        st.lists(st.integers(-40, 80), min_size=len(sites), max_size=len(sites), unique_by=lambda x: x % 4)
    )
    wish = [w + i / 8 for i, w in enumerate(wish)]
    shift = data.draw(st.integers(-8, 8)) / 2 * groups
    assert space.nearest(wish) == space.nearest([w + shift for w in wish])


@given(st.data())
def test_exchanges_are_feasible_tight_and_distinct(data: st.DataObject) -> None:
    space = data.draw(spaces())
    here = space.nearest(data.draw(wishes(space)))
    found = list(space.swaps(here))
    assert len(set(found)) == len(found)
    assert here not in found
    for there in found:
        assert space.is_feasible(there)
        assert is_tight(space, there)


@given(st.data())
def test_an_exchange_raises_one_and_lowers_the_other(data: st.DataObject) -> None:
    space = data.draw(spaces())
    here = space.uniform()
    up, down = (data.draw(st.integers(0, len(space.sites) - 1)) for _ in range(2))
    there, rungs, prices = space.swap(here, up, down), space.rungs(here), space.prices
    members, limit = next(partition for partition in space.partitions if up in partition[0])
    if up == down or down not in members or rungs[up] + 1 == len(space.ladders[up]) or not rungs[down]:
        assert there is None
        return
    paid = sum(prices[i][0 if i == down else rungs[i]] for i in members)  # when `down` gives all it has
    assert (there is not None) == (paid + prices[up][rungs[up] + 1] - prices[up][rungs[up]] <= limit)
    assert there is None or (there[up] > here[up] and there[down] < here[down])


@given(st.data())
def test_kinds_apart_never_trade(data: st.DataObject) -> None:
    space = data.draw(spaces(apart=True))
    here = space.uniform()
    limits = dict(space.budget.by_kind)
    for there in space.swaps(here):
        changed = {s.kind for s, a, b in zip(space.sites, here, there, strict=True) if a != b}
        assert len(changed) == 1
        for kind, limit in limits.items():
            prices = (space.budget.price(s, k) for s, k in zip(space.sites, there, strict=True) if s.kind == kind)
            assert sum(prices) <= limit


@given(st.data())
def test_zoomed_ladders_contain_the_centre(data: st.DataObject) -> None:
    space = data.draw(spaces())
    centre = space.uniform()
    finer = space.zoomed(centre, data.draw(st.sampled_from([0.0, 1 / 64, 1 / 8, 1.0])), data.draw(st.integers(0, 20)))
    assert finer.is_feasible(centre)
    worth = [set(space.budget.counts(site)) for site in space.sites]
    assert all(set(ladder) <= counts for ladder, counts in zip(finer.ladders, worth, strict=True))
    assert all(s.least <= k <= s.n_groups for s, ladder in zip(finer.sites, finer.ladders, strict=True) for k in ladder)


@given(st.data())
@settings(max_examples=60)
def test_lowest_lies_between_the_optimum_and_what_exchanges_can_reach(data: st.DataObject) -> None:
    space = data.draw(spaces())
    table = data.draw(st.sampled_from([convex_table, rough_table]))(space, data.draw(st.integers(0, 99)))

    def loss(allocation: tuple[int, ...]) -> float:
        return sum(row[r] for row, r in zip(table, space.rungs(allocation), strict=True))

    found = space.lowest(table)
    assert space.is_feasible(found)
    assert is_tight(space, found)
    assert loss(found) >= best_allocation(space, table)[1] - 1e-9
    assert all(loss(there) >= loss(found) - 1e-9 for there in space.swaps(found))
    assert space.lowest([[2.0**-60 * t for t in row] for row in table]) == found  # whatever the unit of the losses


def test_four_zooms_halve_the_stride_down_to_one_group() -> None:
    site = Site("s", 0, "mlp", 64, 1, 1)
    space = Space.whole([site], Budget(32)).zoomed((32,), stride=1 / 8, reach=2)
    strides = []
    for _ in range(4):
        low, high = space.ladders[0][:2]
        strides.append(high - low)
        space = space.zoomed((32,), reach=2)
    assert strides == [8, 4, 2, 1]


def test_a_stride_is_never_less_than_one_group() -> None:
    space = small_llama().zoomed((2, 384) * 8, stride=1 / 64, reach=2)
    assert space.ladders[:2] == ((0, 1, 2, 3, 4), (360, 372, 384, 396, 408))


def test_attention_and_mlp_trade_both_ways_at_unequal_prices() -> None:
    sites = sites_of(2, attention=(4, 64), mlp=(768, 1))
    space = Space.whole(sites, Budget.keeping(0.5, sites)).zoomed((2, 384, 2, 384), stride=1 / 8, reach=4)
    here = space.uniform()
    assert space.cost(here) == space.budget.limit
    to_mlp, to_attention = space.swap(here, up=1, down=0), space.swap(here, up=0, down=1)
    assert to_mlp == (0, 480, 2, 384)  # a rung of 96 neurons costs two groups of 64
    assert to_attention == (3, 288, 2, 384)  # and pays for one


def test_of_sites_that_want_the_same_the_first_gets_what_is_left() -> None:
    space = Space.whole([Site(str(i), i, "mlp", 4, 1, 1) for i in range(3)], Budget(7))
    assert space.uniform() == (3, 2, 2)


def test_a_probe_may_cost_anything_but_keeps_a_rung_or_all() -> None:
    space = Space((Site("s", 0, "mlp", 8, 1, 1),), ((1, 3),), Budget(2))
    assert [kept for kept in range(10) if space.is_probe((kept,))] == [1, 3, 8]


def test_sites_without_a_price_keep_all() -> None:
    sites = sites_of(3, attention=(4, 10), mlp=(16, 3))
    space = Space.whole(sites, Budget.keeping(0.5, sites, metric=KVCache()))
    assert space.uniform() == (2, 16, 2, 16, 2, 16)
    assert all(there[1::2] == (16, 16, 16) for there in space.swaps(space.uniform()))


def test_one_site_has_no_neighbours() -> None:
    sites = [Site("only", 0, "mlp", 16, 1, 3)]
    space = Space.whole(sites, Budget.keeping(0.5, sites))
    assert space.uniform() == (8,)
    assert list(space.swaps((8,))) == []


@pytest.mark.parametrize(("metric", "unit"), [(PARAMETERS, 1), (Bytes(), 2), (Bytes(4), 4), (Flops(), 2)])
def test_keeping_a_share_is_exact(metric: Metric, unit: int) -> None:
    sites = sites_of(1, attention=(10, 7), mlp=(10, 3))
    assert Budget.keeping(0.3, sites, metric=metric).limit == 30 * unit  # 0.3 · 100, not 29.99


def test_parameters_outside_the_sites_count_towards_the_share() -> None:
    sites = sites_of(1, attention=(10, 7), mlp=(10, 3))
    assert Budget.keeping(0.9, sites, outside=100).limit == 80  # 180 of 200 stay; 100 of them always


def test_kinds_apart_have_limits_of_their_own() -> None:
    sites = sites_of(1, attention=(10, 7), mlp=(10, 3))
    budget = Budget.keeping(0.5, sites, apart=True)
    assert budget.by_kind == (("attention", 35), ("mlp", 15))
    assert budget.limit == 50


def test_an_unreachable_share_says_what_is_reachable() -> None:
    sites = sites_of(1, attention=(10, 7), mlp=(10, 3))
    with pytest.raises(WrongInput, match=r"reachable is 0 to 0\.5, because 100 of 200 always stay"):
        Budget.keeping(0.4, sites, outside=100)


def test_a_metric_nobody_pays_is_refused() -> None:
    sites = [Site("s", 0, "mlp", 4, 1, 1)]
    with pytest.raises(WrongInput, match="no site has a price in kv-cache"):
        Budget.keeping(0.5, sites, metric=KVCache())


def test_a_budget_knows_the_dense_model_and_what_is_outside() -> None:
    sites = sites_of(1, attention=(10, 7), mlp=(10, 3))
    budget = Budget.keeping(0.9, sites, metric=Flops(), outside=100)
    assert (budget.outside, budget.dense, budget.limit) == (200, 400, 160)
    apart = Budget.keeping(0.5, sites, metric=Cached(), outside=100)
    assert (apart.outside, apart.dense, apart.limit) == (0, 10, 5)


def test_what_is_outside_counts_for_kinds_apart_only_where_it_has_a_price_of_its_own() -> None:
    sites = sites_of(2, attention=(4, 10), mlp=(16, 3))
    assert Budget.keeping(0.5, sites, outside=10, apart=True).by_kind == (("attention", 40), ("mlp", 48))
    budget = Budget.keeping(0.7, sites, metric=Tiles(), apart=True)
    assert budget.by_kind == (("attention", 74), ("mlp", 111))  # 186 of 300, of 120 and 180


def test_ladders_that_start_too_high_say_what_they_cost() -> None:
    site = Site("s", 0, "mlp", 4, 1, 5)
    with pytest.raises(ValueError, match="the lowest rungs cost 10 parameters; the budget is 9"):
        Space((site,), ((2, 3),), Budget(9)).uniform()


@pytest.mark.parametrize("wish", [[1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_a_wish_is_one_finite_number_per_site(wish: list[float]) -> None:
    sites = [Site(str(i), i, "mlp", 4, 1, 1) for i in range(2)]
    with pytest.raises(ValueError, match="2 finite numbers"):
        Space.whole(sites, Budget(4)).nearest(wish)


@pytest.mark.parametrize("ladder", [(), (1, 1), (2, 1), (-1, 0), (0, 5)])
def test_a_ladder_ascends_within_the_site(ladder: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"ascends within 0\.\.4"):
        Space((Site("s", 0, "mlp", 4, 1, 1),), (ladder,), Budget(4))


def test_a_fixed_part_goes_with_the_last_group() -> None:
    site = Site("s", 0, "mlp", 4, 1, 5, params_fixed=3)
    assert [Budget(0).price(site, k) for k in range(5)] == [0, 8, 13, 18, 23]


def test_columns_of_a_group_may_be_spread_over_parts() -> None:
    site = Site("s", 0, "attention", 2, group_size=4, params_per_group=1, spread=2)
    assert site.columns([1]) == [2, 3, 6, 7]


# -- structures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rungs"),
    [
        ("2:4", (1, 2, 3, 4)),
        ("1:4", (1, 2, 3, 4)),
        ("4:8", (2, 4, 6, 8)),
        ("8:16", (4, 8, 12, 16)),
        ("3:8", (1, 2, 3, 4, 5, 6, 7, 8)),
        ("1:2", (1, 2)),
        ("2:3", (1, 2, 3)),
    ],
)
def test_patterns_are_rungs_and_uniform_is_the_pattern_that_was_asked(text, rungs):
    form, d_in = parse_form(text), 48
    assert form.kept_share is not None
    step = form.step(d_in)
    sites = tuple(Site(f"s{i}", 0, "linear", d_in, 1, rows, form=form) for i, rows in enumerate((7, 64, 5)))
    budget = Budget.keeping(form.kept_share, sites)
    space = Space.whole(sites, budget)
    assert space.ladders[0] == tuple(n * d_in // form.m for n in rungs)
    assert {site.describe(k) for site, k in zip(sites, space.uniform(), strict=True)} == {text}
    assert space.cost(space.uniform()) == budget.limit
    near = space.zoomed(space.uniform(), stride=1 / 16, reach=1)
    if text == "3:8":
        assert space.zoomed(space.uniform(), stride=3 / 16, reach=1).ladders[0] == (6, 18, 30)  # 3/16 of 8 rungs: two
    assert all(len(ladder) == min(3, len(rungs)) or ladder[0] == step for ladder in near.ladders)


@pytest.mark.parametrize("text", ["rows", "4:2", "2:2", "0:4", "2:", ":4", "2:4:8", "-1:4", "a:b", ""])
def test_what_is_no_structure_is_one_sentence(text):
    with pytest.raises(WrongInput, match="there are groups, weights, low-rank, and patterns N:M"):
        parse_form(text)


def test_a_count_between_patterns_is_no_rung():
    site = Site("s", 0, "linear", 8, 1, 3, form=Pattern(1, 4))
    with pytest.raises(ValueError, match="multiples of 2"):
        Space((site,), ((2, 3),), Budget(100))
