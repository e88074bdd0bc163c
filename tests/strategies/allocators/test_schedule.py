import math
from typing import get_args

import pytest

from prunekit import Budget, Site, Space
from prunekit.testing import converse
from prunekit.testing.spaces import additive, convex_table, problem, small_llama
from prunekit_strategies.allocators.schedule import Schedule, Shape, ratios, rising

SHAPES = get_args(Shape)


@pytest.mark.parametrize(("depth", "mean"), [(32, 0.7354), (40, 0.7477), (80, 0.7807)])
def test_the_mean_of_the_logarithm_is_that_of_the_factorial(depth, mean):
    curve = rising("log-increase", depth)
    assert sum(curve) / depth == pytest.approx(mean, abs=5e-5)
    assert sum(curve) / depth == pytest.approx(math.lgamma(depth + 1) / (depth * math.log(depth)))


def test_shapes_rise_or_fall_from_end_to_end_and_a_decrease_is_the_mirror():
    for shape in SHAPES:
        curve = rising(shape, 12)
        if shape == "uniform":
            assert curve == [0.0] * 12
        else:
            assert curve == sorted(curve, reverse=shape.endswith("decrease"))
            assert {curve[0], curve[-1]} == {0.0, 1.0}
    assert rising("log-decrease", 12) == rising("log-increase", 12)[::-1]
    assert rising("linear-increase", 5) == [0, 0.25, 0.5, 0.75, 1]
    assert rising("log-increase", 1) == [0.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [0.02, 0.3, 0.5, 0.85])
def test_the_price_weighted_mean_is_met_between_the_bounds(shape, mean):
    prices = [7, 100, 31, 64, 5]
    found = ratios(rising(shape, 5), prices, mean, 0.0, 0.9)
    assert sum(p * r for p, r in zip(prices, found, strict=True)) == pytest.approx(mean * sum(prices))
    assert all(-1e-12 <= r <= 0.9 + 1e-12 for r in found)
    if shape != "uniform":
        assert {round(min(found), 9), round(max(found), 9)} & {0.0, 0.9}  # as bent as the bounds allow


def test_slimgpt_at_half_of_llama_7b():
    found = ratios(rising("log-increase", 32), [1] * 32, 0.5, 0.0, 1.0)
    assert found[0] == 0
    assert found[31] == pytest.approx(0.5 / 0.7354, abs=1e-4)
    assert found[7] == pytest.approx(found[31] * math.log(8) / math.log(32))


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.7])
def test_full_bend_of_the_line_is_the_largest_step_of_atp(mean):
    depth = 10
    steps = min(2 * mean, 2 * (1 - mean)) / (depth - 1)
    found = ratios(rising("linear-increase", depth), [1] * depth, mean, 0.0, 1.0)
    assert found == pytest.approx([mean - steps * (depth - 1) / 2 + steps * b for b in range(depth)])


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_budget_is_spent_and_counts_follow_the_shape(shape, apart):
    whole = small_llama()
    space = Space.whole(whole.sites, Budget.keeping(0.5, whole.sites, apart=apart))
    toy = problem(space)
    answer = converse(Schedule(shape, compete=False), toy).answer
    assert answer == space.nearest(answer)  # tight
    for kind in (0, 1):
        kept = list(answer[kind::2])
        if shape == "uniform":
            assert max(kept) - min(kept) <= 1
        else:
            assert kept == sorted(kept, reverse=shape.endswith("increase"))  # ratios rise, counts fall
            assert kept[0] != kept[-1]


def test_bent_sites_share_what_their_kind_keeps_and_the_others_stay():
    toy = problem(small_llama())
    wish = Schedule("linear-increase", bends="mlp").wish(toy)
    assert wish[::2] == pytest.approx([2.0] * 8)
    assert sum(wish[1::2]) == pytest.approx(8 * 384)
    assert wish[1::2] == sorted(wish[1::2], reverse=True)


def test_unequal_blocks_are_weighed_by_price():
    sites = tuple(Site(str(b), b, "mlp", n, 1, 1) for b, n in enumerate((100, 10, 400)))
    toy = problem(Space.whole(sites, Budget.keeping(0.5, sites)))
    wish = Schedule("linear-increase", highest=1.0).wish(toy)
    assert sum(wish) == pytest.approx(255)


def test_atp_asks_its_grid_and_the_objective_chooses():
    toy = problem(small_llama())
    atp = Schedule("linear-increase", highest=1.0, grid=8, compete=False)
    (ask,) = converse(atp, toy).asks
    assert len(ask) == 8
    firsts = [q.allocation[1] for q in ask]
    assert firsts == sorted(firsts)  # ever more bent
    third = ask[2].allocation
    assert converse(atp, toy, lambda a: float(a != third)).answer == third


def test_the_start_wins_where_the_objective_prefers_it_unless_it_may_not_compete():
    toy = problem(small_llama())
    steep = tuple(
        tuple(e * (1 + 9 * (site.block == 7)) for e in row)
        for row, site in zip(convex_table(toy.space), toy.space.sites, strict=True)
    )
    loss = additive(steep, toy.space)
    assert converse(Schedule(), toy, loss).answer == toy.start
    assert converse(Schedule(compete=False), toy, loss).answer != toy.start
