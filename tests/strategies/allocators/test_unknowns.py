import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from prunekit import Allocator
from prunekit.plugins.registry import ALLOCATORS
from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, small_llama
from prunekit_strategies.allocators.unknowns import Unknowns

SPACE = small_llama().zoomed((2, 384) * 8, stride=1 / 16, reach=16)
CENTRE = SPACE.uniform()


@pytest.mark.parametrize(("waves", "size"), [(None, 16), (0, 2), (3, 8)])
def test_zero_is_the_centre_and_all_else_is_feasible(waves: int | None, size: int) -> None:
    unknowns, rng = Unknowns(SPACE, CENTRE, 0.5, waves), random.Random(0)
    assert unknowns.size == size
    assert unknowns.decode([0.0] * size) == CENTRE
    assert all(SPACE.is_feasible(unknowns.decode([rng.uniform(-1, 1) for _ in range(size)])) for _ in range(50))


def test_wave_zero_trades_one_kind_for_the_other() -> None:
    more_attention = Unknowns(SPACE, CENTRE, 0.25, waves=0).decode([1.0, -1.0])
    assert all(a >= c for a, c in zip(more_attention[::2], CENTRE[::2], strict=True))
    assert all(m < c for m, c in zip(more_attention[1::2], CENTRE[1::2], strict=True))


def test_wave_one_tilts_over_the_depth() -> None:
    mlp = Unknowns(SPACE, CENTRE, 0.25, waves=1).decode([0, 0, 0, 1])[1::2]
    assert list(mlp) == sorted(mlp, reverse=True)
    assert mlp[0] > mlp[-1]


# -- the searches over them ----------------------------------------------------------------------------


@pytest.fixture(params=["nevergrad", "optuna-tpe"])
def search(request: pytest.FixtureRequest) -> Callable[..., Allocator]:
    try:
        found: Any = ALLOCATORS[request.param].load()
    except ImportError as missing:
        pytest.skip(str(missing))
    return partial(found, warm_start="errors")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_is_within_one_percent_of_the_optimum_where_the_table_tells_all(search: Any, share: float) -> None:
    toy = problem(search().first_space(small_llama(share)))
    loss = additive(toy.errors, toy.space)
    found = loss(converse(search.func(trials=20), toy).answer)
    assert found <= 1.01 * best_allocation(toy.space, toy.errors)[1]


def test_learns_what_the_table_does_not_know(search: Any) -> None:
    toy = problem(search().first_space(small_llama()), seed=0)
    hidden = convex_table(toy.space, seed=1)
    loss = additive(hidden, toy.space)
    found, seed = loss(converse(search(trials=100), toy, loss).answer), loss(toy.space.lowest(toy.errors))
    optimum = best_allocation(toy.space, hidden)[1]
    assert found - optimum < 0.75 * (min(seed, loss(toy.start)) - optimum)


def test_asks_no_allocation_twice_before_the_finals_and_keeps_to_its_trials(search: Any) -> None:
    toy = ZOO["uneven"]()
    *trials, finals = converse(search(trials=15, batch=4, finalists=3), toy).asks
    asked = [q.allocation for ask in trials for q in ask]
    assert len(asked) == len(set(asked)) <= 15
    assert {q.tokens for ask in trials for q in ask} == {8_192}
    assert {q.tokens for q in finals} == {None}
    assert 3 <= len(finals) <= 4
    assert toy.start in {q.allocation for q in finals}
