"""What samplers of other libraries have in common; what is their own stands in files of theirs."""

import pytest

from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, small_llama
from prunekit_strategies.allocators.unknowns import Sampled


@pytest.fixture(params=["nevergrad", "optuna_tpe"])
def search_with(request: pytest.FixtureRequest) -> type[Sampled]:
    module = pytest.importorskip(f"prunekit_strategies.allocators.{request.param}", exc_type=ImportError)
    return next(c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Sampled) and c is not Sampled)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_is_near_the_optimum_where_the_table_tells_all(search_with: type[Sampled], share: float) -> None:
    toy = problem(search_with().first_space(small_llama(share)))
    loss = additive(toy.errors, toy.space)
    found = loss(converse(search_with(trials=20), toy).answer)
    assert found <= 1.01 * best_allocation(toy.space, toy.errors)[1]


def test_learns_what_the_table_does_not_know(search_with: type[Sampled]) -> None:
    toy = problem(search_with().first_space(small_llama()), seed=0)
    hidden = convex_table(toy.space, seed=1)
    loss = additive(hidden, toy.space)
    search = search_with(trials=100, warm_start="errors")
    found, seed = loss(converse(search, toy, loss).answer), loss(toy.space.lowest(toy.errors))
    optimum = best_allocation(toy.space, hidden)[1]
    assert found - optimum < 0.75 * (min(seed, loss(toy.start)) - optimum)


def test_asks_no_allocation_twice_before_the_finals_and_keeps_to_its_trials(search_with: type[Sampled]) -> None:
    toy = ZOO["uneven"]()
    *trials, finals = converse(search_with(trials=15, batch=4, finalists=3, warm_start="errors"), toy).asks
    asked = [q.allocation for ask in trials for q in ask]
    assert len(asked) == len(set(asked)) <= 15
    assert {q.tokens for ask in trials for q in ask} == {8_192}
    assert {q.tokens for q in finals} == {None}
    assert 3 <= len(finals) <= 4
    assert toy.start in {q.allocation for q in finals}


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"reach": 0.0}, {"waves": -1}])
def test_refuses_nonsense(search_with: type[Sampled], wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"reach|waves"):
        search_with(**wrong)
