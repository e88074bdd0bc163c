import math
from dataclasses import replace
from itertools import product

import pytest

from prunekit import Allocation
from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, small_llama
from prunekit_strategies.allocators.nsga import NSGA, crowding, dominates, ranked, survivors


def flat(points: list[tuple[float, float]]) -> dict[Allocation, tuple[float, float]]:
    """Aims by a name of one gene."""
    return {(n,): p for n, p in enumerate(points)}


def test_fronts_are_those_of_a_known_set():
    aims = flat([(1, 5), (2, 3), (4, 1), (2, 4), (4, 4), (5, 5), (1, 5)])
    assert [sorted(front) for front in ranked(list(aims), aims)] == [
        [(0,), (1,), (2,), (6,)],
        [(3,)],
        [(4,)],
        [(5,)],
    ]


def test_dominance_is_strict_somewhere():
    assert dominates((1, 2), (1, 3))
    assert not dominates((1, 2), (1, 2))
    assert not dominates((1, 3), (2, 2))


def test_crowding_is_the_box_between_neighbours_and_infinite_at_the_ends():
    aims = flat([(0, 10), (1, 6), (4, 4), (10, 0)])
    distance = crowding(list(aims), aims)
    assert distance[0,] == distance[3,] == math.inf
    assert distance[1,] == pytest.approx(4 / 10 + 6 / 10)
    assert distance[2,] == pytest.approx(9 / 10 + 6 / 10)


def test_extremes_survive_a_crowded_front():
    aims = flat([(x, (10 - x) ** 2) for x in range(11)])
    kept = survivors(list(aims), aims, 4)
    assert {(0,), (10,)} <= set(kept)


def test_the_front_of_two_opposite_aims_is_found():
    """Two sites of 17 rungs: the loss wants all of both, the price none: the front is known by enumeration."""
    toy = ZOO["nearly none"]()
    loss = additive(toy.errors, toy.space)
    nsga = NSGA("price", population=24, generations=30, window=0.9)
    _, *asks = converse(nsga, toy, loss).asks
    met = {q.allocation: (loss(q.allocation), float(toy.space.cost(q.allocation))) for ask in asks for q in ask}
    low, high = 0.1 * toy.space.budget.limit, 1.9 * toy.space.budget.limit
    every = {
        a: (loss(a), float(toy.space.cost(a))) for a in product(*toy.space.ladders) if low <= toy.space.cost(a) <= high
    }
    true = {every[a] for a in ranked(list(every), every)[0]}
    found = {met[a] for a in ranked(list(met), met)[0]}
    assert len(found & true) >= 0.9 * len(true)
    assert any(q.probe and not toy.space.is_feasible(q.allocation) for ask in asks for q in ask)


@pytest.mark.parametrize("against", ["price", "error"])
def test_nobody_it_met_beats_its_answer_at_the_budget(against):
    toy = problem(NSGA().first_space(small_llama()), seed=0)
    loss = additive(convex_table(toy.space, seed=1), toy.space)
    talk = converse(NSGA(against), toy, loss)
    assert loss(talk.answer) <= min(loss(a) for a in talk.asked if toy.space.is_feasible(a)) + 1e-12


def test_every_question_against_the_error_spends_the_budget():
    toy = ZOO["uneven"]()
    talk = converse(NSGA(generations=5, warm_start="errors"), toy)
    assert all(a == toy.space.nearest(a) for a in talk.asked)


def test_no_member_is_judged_twice():
    *generations, _ = converse(NSGA(warm_start="errors"), problem(NSGA().first_space(small_llama()))).asks
    asked = [q.allocation for ask in generations for q in ask]
    assert len(asked) == len(set(asked))


def test_the_optimum_of_an_additive_table_is_among_its_seeds():
    toy = problem(NSGA().first_space(small_llama()))
    loss = additive(toy.errors, toy.space)
    found = converse(NSGA(generations=1), replace(toy, seed=3)).answer
    assert loss(found) <= 1.01 * best_allocation(toy.space, toy.errors)[1]
