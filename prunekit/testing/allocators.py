"""What every allocator promises."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from prunekit.plugins.allocator import Allocator, Problem, Query
from prunekit.search.exact import best_allocation
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation
from prunekit.testing.spaces import ZOO, additive, convex_table, small_llama

MOST_ASKS = 10_000
STRANGE: Mapping[str, Callable[[Allocation], float]] = {
    "some fail": lambda a: math.inf if sum(a) % 2 else 1.0 * sum(a),
    "all fail": lambda a: math.inf,
    "all equal": lambda a: 0.0,
    "huge": lambda a: 1e300 * (1 + sum(a)),
    "negative": lambda a: -1.0 * a[0],
}
"""Losses that no model would have."""


@dataclass(frozen=True)
class Talk:
    """A whole conversation."""

    answer: Allocation
    asks: tuple[tuple[Query, ...], ...]

    @property
    def asked(self) -> set[Allocation]:
        """Every allocation in question."""
        return {q.allocation for ask in self.asks for q in ask}


def converse(allocator: Allocator, problem: Problem, loss: Callable[[Allocation], float] | None = None) -> Talk:
    """Answer an allocator from a function, the problem's own table unless told; it must end."""
    loss = loss or additive(problem.errors, problem.space)
    search, asks, losses = allocator.search(problem), [], None
    while len(asks) < MOST_ASKS:
        try:
            queries: Sequence[Query] = next(search) if losses is None else search.send(losses)
        except StopIteration as stop:
            return Talk(stop.value, tuple(asks))
        asks.append(tuple(queries))
        losses = [loss(q.allocation) for q in queries]
    raise AssertionError(f"{allocator} still asks after {MOST_ASKS} asks")


def furnished(problem: Problem, allocator: Allocator, seed: int = 0) -> Problem:
    """The problem with made-up numbers for everything the allocator wants to have measured."""
    rng, sites = random.Random(seed), problem.space.sites
    signals = tuple(tuple(rng.random() for _ in sites) for _ in allocator.signals)
    scores = tuple(tuple(rng.expovariate(1) for _ in range(site.n_groups)) for site in sites)
    asked = {"scores": scores, "nats": problem.errors}
    return replace(problem, signals=signals, **{name: asked[name] for name in allocator.needs})


class AllocatorSuite:
    """Subclass it, name it Test..., and set `plugin`."""

    plugin: Allocator

    @pytest.fixture
    def uneven(self) -> Problem:
        return furnished(ZOO["uneven"](), self.plugin)

    @pytest.mark.parametrize("name", ZOO)
    def test_asks_fairly_and_answers_between_the_start_and_the_optimum(self, name: str) -> None:
        problem = furnished(ZOO[name](), self.plugin)
        talk, loss = converse(self.plugin, problem), additive(problem.errors, problem.space)
        assert bool(talk.asks) == self.plugin.asks, "it asks as it says"
        assert all(talk.asks)
        assert all(len(set(ask)) == len(ask) for ask in talk.asks), "nothing twice in one ask"
        _assert_fair(talk, problem.space)
        assert _optimum(name) - 1e-9 <= loss(talk.answer) <= loss(problem.start) + 1e-9
        assert converse(self.plugin, problem) == talk, "one seed is one conversation"

    def test_leaves_the_global_random_state_alone(self, uneven: Problem) -> None:
        before = _random_state()
        converse(self.plugin, uneven)
        assert _random_state() == before

    def test_survives_strange_losses(self, uneven: Problem, subtests: pytest.Subtests) -> None:
        for name, loss in STRANGE.items():
            with subtests.test(name):
                _assert_fair(converse(self.plugin, uneven, loss), uneven.space)

    def test_survives_tables_that_tell_nothing(self, uneven: Problem, subtests: pytest.Subtests) -> None:
        for error in (0.0, 1e30):
            with subtests.test(error=error):
                table = tuple((error,) * len(ladder) for ladder in uneven.space.ladders)
                flat = replace(uneven, errors=table, nats=None if uneven.nats is None else table)
                assert flat.space.is_feasible(converse(self.plugin, flat).answer)

    def test_survives_measurements_that_tell_nothing(self, uneven: Problem, subtests: pytest.Subtests) -> None:
        if not uneven.signals and uneven.scores is None:
            pytest.skip("it asks for no measurements")
        for value in (0.0, -1.0, 1e300):
            with subtests.test(value=value):
                flat = replace(
                    uneven,
                    signals=tuple((value,) * len(row) for row in uneven.signals),
                    scores=None if uneven.scores is None else tuple((value,) * len(row) for row in uneven.scores),
                )
                assert flat.space.is_feasible(converse(self.plugin, flat).answer)

    def test_its_ladders_contain_the_centre_and_come_to_an_end(self) -> None:
        space: Space | None = self.plugin.first_space(small_llama())
        best = space.uniform()
        for _ in range(50):
            assert space.is_feasible(best)
            space = self.plugin.next_space(space, best)
            if space is None:
                return
            best = space.lowest(convex_table(space))
        raise AssertionError(f"{self.plugin} zooms for ever")


def _random_state() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


@cache
def _optimum(name: str) -> float:
    problem = ZOO[name]()
    return best_allocation(problem.space, problem.errors)[1]


def _assert_fair(talk: Talk, space: Space) -> None:
    for query in (q for ask in talk.asks for q in ask):
        assert space.is_feasible(query.allocation) or (query.probe and space.is_probe(query.allocation)), query
    assert space.is_feasible(talk.answer)
