from dataclasses import replace

import pytest

from prunekit import Budget, Site, Space
from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import additive, convex_table, problem, rough_table, small_llama
from prunekit_strategies.allocators.greedy import Greedy

BY_TABLE = Greedy(by="table", table="errors")


def equal_steps(seed):
    sites = tuple(Site(str(i), i, "mlp", 6 + i, 1, 5) for i in range(6))
    return problem(Space.whole(sites, Budget.keeping(0.5, sites)), seed=seed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("greedy", [BY_TABLE, Greedy(width=None), Greedy(table="errors")], ids=str)
def test_on_convex_curves_with_steps_of_one_price_it_is_dynamic_programming(greedy, seed):
    toy = equal_steps(seed)
    loss = additive(toy.errors, toy.space)
    assert loss(converse(greedy, toy).answer) == pytest.approx(best_allocation(toy.space, toy.errors)[1])


def test_every_step_is_the_best_of_all_neighbours():
    toy = equal_steps(0)
    loss = additive(rough_table(toy.space, 2), toy.space)
    talk = converse(Greedy(width=None), toy, loss)
    here = talk.asks[0][0].allocation
    assert len(talk.asks) > 3
    for ask in talk.asks[1:-1]:
        around = {q.allocation for q in ask}
        assert around == set(toy.space.swaps(here))
        best = min(around, key=loss)
        if loss(best) >= loss(here):
            assert ask is talk.asks[-2]
            break
        here = best
    assert talk.answer == here


def test_questions_go_on_where_the_table_ends():
    toy = problem(Greedy().first_space(small_llama()), seed=0)
    loss = additive(convex_table(toy.space, seed=1), toy.space)
    assert loss(converse(Greedy(table="errors"), toy, loss).answer) < loss(converse(BY_TABLE, toy, loss).answer)


def test_only_a_few_neighbours_are_asked():
    toy = problem(Greedy().first_space(small_llama()))
    probes, _, *steps, ends = converse(Greedy(width=5, steps=3), toy).asks
    assert all(q.probe for q in probes)
    assert 1 <= len(steps) <= 3
    assert all(len(ask) == 5 for ask in steps)
    assert {q.tokens for q in ends} == {None}


def test_the_start_wins_where_the_last_word_is_against_the_end():
    toy = replace(equal_steps(0), tokens=0)
    assert converse(BY_TABLE, toy, lambda a: float(a != toy.start)).answer == toy.start
