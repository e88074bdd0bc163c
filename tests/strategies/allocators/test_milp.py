import math
import sys
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

from prunekit import Budget, Metric, Space, WrongInput
from prunekit.plugins.registry import ALLOCATORS, METRICS, Entry
from prunekit.space.forms import WEIGHTS
from prunekit.testing import converse
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, rough_table, sites_of, small_llama, timed

pytest.importorskip("scipy")
from prunekit_strategies.allocators.milp import MixedInteger
from prunekit_strategies.allocators.table import lowest
from prunekit_strategies.metrics.formulas import Flops, KVCache
from prunekit_strategies.metrics.latency import Latency


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
    allocator = MixedInteger(limits=((KVCache(), 0.4), (Flops(), 0.5)), candidates=3, differ=1)
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


def test_time_that_was_measured_is_one_more_limit():
    sites = sites_of(2, attention=(4, 10), mlp=(16, 3))
    space = Space.whole(sites, Budget.keeping(0.6, sites))
    time, table = Latency(prices=timed(sites).as_dict()), rough_table(space, 1)
    allocator = MixedInteger(limits=((time, 0.5),), candidates=3, differ=1)
    loss, dear = additive(table, space), sum(time.price(site, site.n_groups) for site in sites)
    able = [
        a
        for a in product(*space.ladders)
        if space.is_feasible(a) and 2 * sum(time.price(s, k) for s, k in zip(sites, a, strict=True)) <= dear
    ]
    found = list(allocator.solutions(space, table))
    assert [loss(a) for a in found] == pytest.approx(sorted(map(loss, able))[:3], abs=1e-8)
    assert loss(found[0]) > min(loss(a) for a in product(*space.ladders) if space.is_feasible(a)), "it binds"


def test_a_start_beyond_the_limits_does_not_compete():
    toy = problem(small_llama().zoomed(small_llama().uniform(), stride=1 / 8, reach=8))
    allocator = MixedInteger(table="errors", limits=((KVCache(), 0.25),))
    talk = converse(allocator, toy, lambda a: -float(sum(a[::2])))  # the objective wants attention
    assert toy.start not in talk.asked
    assert sum(talk.answer[::2]) <= 8


def test_what_the_budget_leaves_is_not_spent_on_what_a_limit_forbids():
    whole = small_llama()
    allocator = MixedInteger(table="errors", limits=((KVCache(), 0.25),))
    answer = converse(allocator, problem(allocator.first_space(whole))).answer
    (built,) = product(*allocator.last_space(whole, answer).ladders)
    assert built == answer
    assert sum(built[::2]) <= 8
    assert MixedInteger().last_space(whole, answer).ladders != allocator.last_space(whole, answer).ladders


def test_limits_that_cannot_be_kept_are_refused():
    sites = sites_of(2, attention=(4, 10), mlp=(6, 3))
    space = Space(sites, ((4,), (0, 3), (4,), (0, 3)), Budget.keeping(0.9, sites))
    with pytest.raises(WrongInput, match=r"0\.5 of kv-cache; raise a limit"):
        list(MixedInteger(limits=((KVCache(), 0.5),)).solutions(space, convex_table(space)))


def test_large_prices_are_kept_in_whole_numbers():
    sites = sites_of(2, attention=(8, 50_331_649), mlp=(64, 2_097_143))  # no common divisor
    space = Space.whole(sites, Budget.keeping(0.5, sites)).zoomed((4, 32) * 2, stride=1 / 8, reach=8)
    table = convex_table(space)
    loss = additive(table, space)
    found = list(MixedInteger(candidates=5, differ=1).solutions(space, table))
    assert all(space.is_feasible(a) for a in found)
    every = sorted(loss(a) for a in product(*space.ladders) if space.is_feasible(a))
    assert [loss(a) for a in found] == pytest.approx(every[:5])


@dataclass(frozen=True)
class Joules(Metric):
    """A third party's: attention is dear, in steps of two groups."""

    unit = "joules"

    dear: int = 7

    def price(self, site, kept):
        return (self.dear if site.kind == "attention" else 1) * (kept + kept % 2)

    def outside(self, sites, parameters):
        return 0


@pytest.fixture
def _joules(monkeypatch):
    point = EntryPoint("joules", f"{__name__}:Joules", METRICS.group)
    monkeypatch.setitem(METRICS._entries, "joules", Entry("metric", "joules", "their-package", point))
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Joules=Joules))


@pytest.mark.usefixtures("_joules")
def test_any_metric_can_be_a_limit():
    sites = sites_of(2, attention=(4, 10), mlp=(6, 3))
    space = Space.whole(sites, Budget.keeping(0.8, sites))
    table = rough_table(space)
    allocator: Any = ALLOCATORS.build({"name": "milp", "differ": 1, "limits": [[{"name": "joules", "dear": 5}, 0.5]]})
    assert hash(allocator)
    assert ALLOCATORS.build(ALLOCATORS.spec(allocator)) == allocator
    metric, loss = Joules(5), additive(table, space)

    def joules(plan):
        return sum(metric.price(site, kept) for site, kept in zip(sites, plan, strict=True))

    able = [a for a in product(*space.ladders) if space.is_feasible(a) and joules(a) <= 0.5 * joules((4, 6, 4, 6))]
    found = list(allocator.solutions(space, table))
    assert [loss(a) for a in found] == pytest.approx(sorted(map(loss, able))[: len(found)])
    assert set(found) <= set(able)


def test_a_limit_that_the_structure_does_not_free_is_refused():
    sites = tuple(replace(site, form=WEIGHTS) for site in sites_of(2, attention=(4, 10), mlp=(6, 3)))
    space = Space.whole(sites, Budget.keeping(0.8, sites))
    with pytest.raises(WrongInput, match="structure weights frees nothing in kv-cache"):
        MixedInteger(limits=((KVCache(), 0.5),)).first_space(space)
