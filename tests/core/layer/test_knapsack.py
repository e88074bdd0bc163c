"""The budget arithmetic of learners: exact sets, exact points."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.layer.knapsack import Knapsack
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.testing.spaces import Cached, Tiles, sites_of


def space(groups: Sequence[int], prices: Sequence[int], limit: int, fixed: int = 0) -> Space:
    sites = tuple(
        Site(str(i), i, "mlp", n, 1, price, fixed) for i, (n, price) in enumerate(zip(groups, prices, strict=True))
    )
    return Space.whole(sites, Budget(limit))


def value_of(knapsack: Knapsack, value: torch.Tensor) -> float:
    return float(value[knapsack.project(value)].sum())


def brute(knapsack: Knapsack, value: torch.Tensor) -> float:
    """The largest value of any mask that is feasible."""
    masks = torch.cartesian_prod(*[torch.tensor([False, True])] * len(value))
    counts = torch.stack([mask.sum(1) for mask in masks.split(knapsack.sizes, 1)], 1)
    feasible = {tuple(row): knapsack.space.is_feasible(tuple(row)) for row in counts.unique(dim=0).tolist()}
    there = torch.tensor([feasible[tuple(row)] for row in counts.tolist()])
    return float((masks[there].double() @ value).max())


def is_tight(knapsack: Knapsack, keep: torch.Tensor) -> bool:
    counts = knapsack.counts(keep)
    up = (tuple(k + (i == j) for j, k in enumerate(counts)) for i in range(len(counts)))
    return knapsack.space.is_feasible(counts) and not any(map(knapsack.space.is_feasible, up))


@settings(max_examples=16, deadline=None)
@given(
    st.sampled_from([((6,), (2,)), ((3, 5), (4, 1)), ((2, 4, 2), (3, 1, 3)), ((2, 3, 4), (5, 2, 3))]),
    st.integers(0, 10**6),
    st.floats(0.1, 0.95),
)
def test_is_the_best_of_all_sets(shape: tuple[tuple[int, ...], tuple[int, ...]], seed: int, share: float) -> None:
    groups, prices = shape
    full = sum(n * price for n, price in zip(groups, prices, strict=True))
    knapsack = Knapsack(space(groups, prices, int(share * full)))
    value = torch.rand(sum(groups), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert value_of(knapsack, value) == pytest.approx(brute(knapsack, value))
    assert is_tight(knapsack, knapsack.project(value))
    assert is_tight(knapsack, knapsack.project(torch.zeros_like(value)))


@pytest.mark.parametrize("metric", [Tiles(), Cached()])
def test_prices_from_a_table_are_met(metric: Tiles | Cached) -> None:
    sites = sites_of(2, attention=(2, 10), mlp=(4, 3))
    whole = Space.whole(sites, Budget.keeping(0.6, sites, metric=metric))
    knapsack, value = Knapsack(whole), torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert value_of(knapsack, value) == pytest.approx(brute(knapsack, value))


def test_kinds_that_do_not_trade_have_each_their_own() -> None:
    sites = sites_of(2, attention=(4, 10), mlp=(16, 3))
    whole = Space.whole(sites, Budget.keeping(0.5, sites, apart=True))
    assert Knapsack(whole).counts(Knapsack(whole).project(torch.ones(40).double()))[::2] in {(4, 0), (2, 2), (3, 1)}


def test_a_site_that_is_left_empty_pays_no_fixed_price() -> None:
    knapsack = Knapsack(space((3, 3), (2, 2), limit=8, fixed=2))
    value = torch.tensor([3.0, 2.0, 1.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert knapsack.counts(knapsack.project(value)) == (3, 0)  # 2 + 6: with both open 4 are left for two groups


def test_the_limit_falls_from_dense_and_sets_nest_if_asked() -> None:
    knapsack = Knapsack(space((4, 8), (3, 1), limit=10))
    value, keep = torch.rand(12, generator=torch.Generator().manual_seed(1)).double(), torch.ones(12, dtype=torch.bool)
    for progress in (0.0, 0.3, 0.7, 1.0):
        smaller = knapsack.project(value, among=keep, progress=progress)
        assert not bool((smaller & ~keep).any())
        assert knapsack.space.cost(knapsack.counts(smaller)) <= 20 - progress * 10
        keep = smaller
    assert bool(knapsack.project(value, progress=0.0).all())


def test_refuses_what_is_no_value() -> None:
    knapsack = Knapsack(space((2,), (1,), limit=1))
    for value in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite values"):
            knapsack.project(torch.tensor(value))


@given(st.lists(st.floats(-2, 3), min_size=8, max_size=8), st.floats(0.05, 0.95))
@settings(max_examples=40, deadline=None)
def test_the_nearest_point_costs_the_budget_and_is_a_shift_by_price(point: list[float], share: float) -> None:
    knapsack = Knapsack(space((3, 5), (4, 1), limit=int(share * 17) or 1))
    p, c = torch.tensor(point, dtype=torch.float64), knapsack.price
    q = knapsack.euclid(p)
    assert bool(((q >= 0) & (q <= 1)).all())
    assert float(c @ q) == pytest.approx(knapsack.space.budget.limit)
    inside = (q > 1e-9) & (q < 1 - 1e-9)
    shift = ((p - q) / c)[inside]  # of those inside one ν, of either sign
    assert bool((shift - shift.mean()).abs().max() < 1e-6) if len(shift) else True


def test_with_prices_for_weights_all_are_shifted_alike_however_dear() -> None:
    dear = Knapsack(space((4, 400), (64, 1), limit=190))  # 656 in all
    even, shifted = (dear.euclid(torch.full((404,), 0.5), weight) for weight in (None, dear.price))
    assert float(even[:4].max()) < 0.01, "without, those that cost more are the first to close"
    assert shifted.tolist() == pytest.approx([190 / 656] * 404)
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(404, generator=rng, dtype=torch.float64)
    q = dear.euclid(p, dear.price)
    assert float(dear.price @ q) == pytest.approx(190)
    inside = (q > 1e-9) & (q < 1 - 1e-9)
    assert (p - q)[inside].tolist() == pytest.approx([float((p - q)[inside].mean())] * int(inside.sum()))


def test_of_what_is_spared_all_stays_and_the_others_share_what_is_left() -> None:
    sites = tuple(
        Site(f"{i}", i, "mlp", 4, 1, price, spared=i == 1) for i, price in enumerate((3, 5, 1))
    )  # 12, 20 and 4
    knapsack = Knapsack(Space.whole(sites, Budget.keeping(28 / 36, sites)))
    assert knapsack.fixed.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert knapsack.price.tolist() == [3.0] * 4 + [0.0] * 4 + [1.0] * 4
    for weight in (None, knapsack.price):
        point = knapsack.euclid(torch.full((12,), 0.3, dtype=torch.float64), weight)
        assert point[4:8].tolist() == [1.0] * 4
        assert float(knapsack.price @ point) == pytest.approx(8)
    kept = knapsack.project(torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0] * 4))
    assert bool(kept[4:8].all())


def test_a_point_below_the_budget_is_raised() -> None:
    knapsack = Knapsack(space((4,), (1,), limit=3))
    assert knapsack.euclid(torch.full((4,), 0.1)).tolist() == pytest.approx([0.75] * 4)
