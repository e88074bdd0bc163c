from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import Budget, Site, Space
from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import ZOO, additive, problem, rough_table, small_llama
from prunekit_strategies.allocators import table as module
from prunekit_strategies.allocators.table import DynamicProgramming, depth_only, lowest, tightened

ERRORS = DynamicProgramming(table="errors")


def brute(space, table):
    """Every feasible allocation with its sum, ascending."""
    loss = additive(table, space)
    return sorted((loss(a), a) for a in product(*space.ladders) if space.is_feasible(a))


@st.composite
def spaces(draw):
    """Two to four sites of unlike size and price, free or kept apart, with a table of any shape."""
    sites = tuple(
        Site(str(i), i, kind, draw(st.integers(1, 4)), 1, draw(st.integers(1, 7)), draw(st.integers(0, 5)))
        for i, kind in enumerate(draw(st.lists(st.sampled_from(["attention", "mlp"]), min_size=2, max_size=4)))
    )
    budget = Budget.keeping(draw(st.sampled_from([0.2, 0.5, 0.8])), sites, apart=draw(st.booleans()))
    space = Space.whole(sites, budget)
    entries = st.floats(-1, 1, width=16)
    table = [draw(st.lists(entries, min_size=len(rungs), max_size=len(rungs))) for rungs in space.ladders]
    return space, table


@settings(max_examples=60)
@given(spaces())
def test_the_lowest_are_those_of_brute_force_in_order_and_each_once(case):
    space, table = case
    loss, known = additive(table, space), brute(space, table)
    found = lowest(space, table, 7)
    assert len(set(found)) == len(found) == min(7, len(known))
    assert all(space.is_feasible(a) for a in found)
    assert [loss(a) for a in found] == pytest.approx([x for x, _ in known[:7]], abs=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_it_is_the_oracle_on_a_small_llama(share):
    whole = small_llama(share)
    toy = problem(ERRORS.first_space(whole))
    found = converse(ERRORS, toy).answer
    assert additive(toy.errors, toy.space)(found) == pytest.approx(best_allocation(toy.space, toy.errors)[1], abs=1e-12)


def test_prices_too_fine_to_count_are_rounded_up_and_lose_little(monkeypatch):
    toy = ZOO["uneven"]()
    loss, optimum = additive(toy.errors, toy.space), best_allocation(toy.space, toy.errors)[1]
    monkeypatch.setattr(module, "CELLS", 20)
    (found,) = lowest(toy.space, toy.errors)
    assert toy.space.is_feasible(found)
    assert optimum - 1e-9 <= loss(tightened(toy.space, toy.errors, found)) <= 1.1 * optimum


def test_a_budget_below_the_lowest_rungs_is_refused():
    toy = ZOO["even"]()
    poor = replace(toy.space, ladders=((3, 4),) * 4)
    with pytest.raises(ValueError, match="lowest rungs cost more"):
        lowest(poor, rough_table(poor))


def test_depth_only_drops_what_the_table_says_and_spends_the_rest():
    toy = ZOO["even"]()  # 4 sites of 4 groups, 8 may stay
    table = ((1, 0, 0, 0, 0), (9, 0, 0, 0, 0), (2, 0, 0, 0, 0), (8, 0, 0, 0, 0))
    assert depth_only(toy.space, table) == (0, 4, 0, 4)
    richer = replace(toy.space, budget=Budget(9))
    assert depth_only(richer, table)[1::2] == (4, 4)
    assert richer.cost(depth_only(richer, table)) == 9


def test_uniform_and_depth_only_and_the_best_few_meet_the_objective_which_decides():
    toy = ZOO["even"]()
    favourite = depth_only(toy.space, toy.errors)
    talk = converse(DynamicProgramming(table="errors", candidates=3), toy, lambda a: float(a != favourite))
    assert talk.answer == favourite
    (ask,) = talk.asks
    asked = [q.allocation for q in ask]
    assert {toy.start, favourite, lowest(toy.space, toy.errors)[0]} <= set(asked)
    assert 3 <= len(asked) <= 5


@pytest.mark.parametrize("around", ["start", "dense"])
def test_a_table_of_probes_finds_what_the_errors_do_not_know(around):
    toy = problem(DynamicProgramming().first_space(small_llama()), seed=0)
    hidden = rough_table(toy.space, seed=1)
    loss = additive(hidden, toy.space)
    all_rungs = DynamicProgramming(around=around, reach=1.0, points=32)
    found = converse(all_rungs, toy, loss).answer
    assert loss(found) == pytest.approx(best_allocation(toy.space, hidden)[1])


def test_every_round_probes_around_the_answer_before_and_nearer():
    toy = problem(DynamicProgramming().first_space(small_llama()), seed=0)
    bent = additive(rough_table(toy.space, 1), toy.space)

    def loss(a):
        return bent(a) ** 2  # not additive

    probes = [ask for ask in converse(DynamicProgramming(rounds=3), toy, loss).asks if ask[0].probe]
    answers = [converse(DynamicProgramming(rounds=n), toy, loss).answer for n in (1, 2, 3)]
    assert [ask[0].allocation for ask in probes] == [toy.start, *answers[:2]]
    assert [loss(a) for a in answers] == sorted(map(loss, answers), reverse=True)
    moved = [max(abs(q.allocation[1] - ask[0].allocation[1]) for q in ask) for ask in probes]
    assert moved == [192, 96, 48]


def test_drop_or_keep_is_one_question_per_site_and_one_for_the_dense_model():
    allocator = DynamicProgramming(around="dense", reach=1.0, stride=1.0)
    toy = problem(allocator.first_space(small_llama()))
    assert set(toy.space.ladders) == {(0, 4), (0, 768)}
    probes = converse(allocator, toy).asks[0]
    assert all(q.probe for q in probes)
    assert len(probes) == 1 + len(toy.space.sites)


@pytest.mark.parametrize("table", ["errors", "fisher"])
def test_rounds_of_a_table_that_stays_the_same_are_refused(table):
    with pytest.raises(ValueError, match="same in every round"):
        DynamicProgramming(table=table, rounds=2)
