import math
from itertools import product

import pytest

from prunekit import Budget, Space, WrongInput
from prunekit.testing import converse
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, rough_table, sites_of, small_llama

pytest.importorskip("scipy")
from prunekit_strategies.allocators.milp import MixedInteger
from prunekit_strategies.allocators.table import lowest


@pytest.mark.parametrize("name", ZOO)
def test_next_best_solutions_are_those_of_dynamic_programming(name):
    toy = ZOO[name]()
    loss = additive(toy.errors, toy.space)
    found = list(MixedInteger(candidates=4, differ=1).solutions(toy.space, toy.errors))
    assert [loss(a) for a in found] == pytest.approx([loss(a) for a in lowest(toy.space, toy.errors, 4)], abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_several_limits_at_once_are_brute_force(seed):
    sites = sites_of(2, attention=(4, 10), mlp=(6, 3))
    space = Space.whole(sites, Budget.keeping(0.6, sites))
    table = rough_table(space, seed)
    allocator = MixedInteger(limits=(("kv-cache", 0.4), ("flops", 0.5)), candidates=3, differ=1)
    loss, cached = additive(table, space), sum(s.n_groups for s in sites[::2])
    whole = sum(s.parameters(s.n_groups) for s in sites)
    able = [
        a
        for a in product(*space.ladders)
        if space.cost(a) <= min(space.budget.limit, math.floor(0.5 * whole)) and sum(a[::2]) <= 0.4 * cached
    ]
    found = list(allocator.solutions(space, table))
    assert [loss(a) for a in found] == pytest.approx(sorted(map(loss, able))[:3])
    assert all(a in able and allocator.keeps(space, a) for a in found)


def test_cuts_keep_candidates_apart_and_each_is_the_best_that_is_left():
    toy = ZOO["even"]()
    loss = additive(toy.errors, toy.space)
    found = list(MixedInteger(candidates=5, differ=3).solutions(toy.space, toy.errors))

    def apart(a, b):
        return sum(x != y for x, y in zip(a, b, strict=True))

    every = [a for a in product(*toy.space.ladders) if toy.space.is_feasible(a)]
    for n, a in enumerate(found):
        left = [b for b in every if all(apart(b, before) >= 3 for before in found[:n])]
        assert loss(a) == pytest.approx(min(map(loss, left)))


def test_a_start_beyond_the_limits_does_not_compete():
    toy = problem(small_llama().zoomed(small_llama().uniform(), stride=1 / 8, reach=8))
    allocator = MixedInteger(table="errors", limits=(("kv-cache", 0.25),))
    talk = converse(allocator, toy, lambda a: -float(sum(a[::2])))  # the objective wants attention
    assert toy.start not in talk.asked
    assert sum(talk.answer[::2]) <= 8


def test_what_the_budget_leaves_is_not_spent_on_what_a_limit_forbids():
    whole = small_llama()
    allocator = MixedInteger(table="errors", limits=(("kv-cache", 0.25),))
    answer = converse(allocator, problem(allocator.first_space(whole))).answer
    (built,) = product(*allocator.last_space(whole, answer).ladders)
    assert built == answer
    assert sum(built[::2]) <= 8
    assert MixedInteger().last_space(whole, answer).ladders != allocator.last_space(whole, answer).ladders


def test_limits_that_cannot_be_kept_are_refused():
    sites = sites_of(2, attention=(4, 10), mlp=(6, 3))
    space = Space(sites, ((4,), (0, 3), (4,), (0, 3)), Budget.keeping(0.9, sites))
    with pytest.raises(WrongInput, match=r"0\.5 of kv-cache; raise a limit"):
        list(MixedInteger(limits=(("kv-cache", 0.5),)).solutions(space, convex_table(space)))


def test_large_prices_are_kept_in_whole_numbers():
    sites = sites_of(2, attention=(8, 50_331_649), mlp=(64, 2_097_143))  # no common divisor
    space = Space.whole(sites, Budget.keeping(0.5, sites)).zoomed((4, 32) * 2, stride=1 / 8, reach=8)
    table = convex_table(space)
    loss = additive(table, space)
    found = list(MixedInteger(candidates=5, differ=1).solutions(space, table))
    assert all(space.is_feasible(a) for a in found)
    every = sorted(loss(a) for a in product(*space.ladders) if space.is_feasible(a))
    assert [loss(a) for a in found] == pytest.approx(every[:5])
