import pytest

from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, small_llama

pytest.importorskip("nevergrad")
from prunekit_strategies.allocators.nevergrad import NevergradSearch


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_is_within_one_percent_of_the_optimum_where_the_table_tells_all(share: float) -> None:
    toy = problem(NevergradSearch().first_space(small_llama(share)))
    loss = additive(toy.errors, toy.space)
    found = loss(converse(NevergradSearch(trials=20), toy).answer)
    assert found <= 1.01 * best_allocation(toy.space, toy.errors)[1]


def test_learns_what_the_table_does_not_know() -> None:
    toy = problem(NevergradSearch().first_space(small_llama()), seed=0)
    hidden = convex_table(toy.space, seed=1)
    loss = additive(hidden, toy.space)
    search = NevergradSearch(trials=100, warm_start="errors")
    found, seed = loss(converse(search, toy, loss).answer), loss(toy.space.lowest(toy.errors))
    optimum = best_allocation(toy.space, hidden)[1]
    assert found - optimum < 0.75 * (min(seed, loss(toy.start)) - optimum)


def test_asks_no_allocation_twice_before_the_finals_and_keeps_to_its_trials() -> None:
    toy = ZOO["uneven"]()
    *trials, finals = converse(NevergradSearch(trials=15, batch=4, finalists=3, warm_start="errors"), toy).asks
    asked = [q.allocation for ask in trials for q in ask]
    assert len(asked) == len(set(asked)) <= 15
    assert {q.tokens for ask in trials for q in ask} == {8_192}
    assert {q.tokens for q in finals} == {None}
    assert 3 <= len(finals) <= 4
    assert toy.start in {q.allocation for q in finals}


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"reach": 0.0}, {"waves": -1}])
def test_refuses_nonsense(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"reach|waves"):
        NevergradSearch(**wrong)


@pytest.mark.parametrize("optimizer", ["CMA", "NGOpt", "OnePlusOne", "TwoPointsDE"])
def test_any_optimizer_may_search(optimizer: str) -> None:
    toy = ZOO["uneven"]()
    loss = additive(toy.errors, toy.space)
    assert loss(converse(NevergradSearch(optimizer, trials=20), toy).answer) < loss(toy.start)


def test_an_unknown_optimizer_is_refused_with_near_matches() -> None:
    with pytest.raises(ValueError, match=r"no optimizer 'TwoPointDE'.*TwoPointsDE"):
        NevergradSearch("TwoPointDE")
