"""What every allocator promises."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from prunekit.plugins.allocator import Allocator, Problem, Query
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation
from prunekit.testing.oracle import best_allocation
from prunekit.testing.spaces import ZOO, additive, convex_table, small_llama

MOST_ASKS = 10_000


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
    return replace(problem, signals=signals, scores=scores if "scores" in allocator.needs else None)


class AllocatorSuite:
    """Subclass it, name it Test..., and set `plugin`."""

    plugin: Allocator

    @pytest.fixture(params=ZOO)
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        return furnished(ZOO[request.param](), self.plugin)

    @pytest.fixture
    def uneven(self) -> Problem:
        return furnished(ZOO["uneven"](), self.plugin)

    def test_every_question_is_feasible_or_a_probe_and_the_answer_is_feasible(self, problem: Problem) -> None:
        talk = converse(self.plugin, problem)
        assert talk.asks
        assert all(talk.asks)
        _assert_fair(talk, problem.space)

    def test_is_no_worse_than_the_start_nor_better_than_the_optimum(self, problem: Problem) -> None:
        loss = additive(problem.errors, problem.space)
        found = loss(converse(self.plugin, problem).answer)
        _, optimum = best_allocation(problem.space, problem.errors)
        assert optimum - 1e-9 <= found <= loss(problem.start) + 1e-9

    def test_one_seed_is_one_conversation(self, problem: Problem) -> None:
        assert converse(self.plugin, problem) == converse(self.plugin, problem)

    def test_asks_nothing_twice_in_one_ask(self, problem: Problem) -> None:
        assert all(len(set(ask)) == len(ask) for ask in converse(self.plugin, problem).asks)

    def test_leaves_the_global_random_state_alone(self, uneven: Problem) -> None:
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
        converse(self.plugin, uneven)
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
        assert before == after

    @pytest.mark.parametrize(
        "loss",
        [
            pytest.param(lambda a: math.inf if sum(a) % 2 else 1.0 * sum(a), id="some fail"),
            pytest.param(lambda a: math.inf, id="all fail"),
            pytest.param(lambda a: 0.0, id="all equal"),
            pytest.param(lambda a: 1e300 * (1 + sum(a)), id="huge"),
            pytest.param(lambda a: -1.0 * a[0], id="negative"),
        ],
    )
    def test_survives_strange_losses(self, loss: Callable[[Allocation], float], uneven: Problem) -> None:
        talk = converse(self.plugin, uneven, loss)
        _assert_fair(talk, uneven.space)

    @pytest.mark.parametrize("errors", [0.0, 1e30], ids=["all zero", "huge"])
    def test_survives_tables_that_tell_nothing(self, errors: float, uneven: Problem) -> None:
        flat = replace(uneven, errors=tuple((errors,) * len(ladder) for ladder in uneven.space.ladders))
        assert flat.space.is_feasible(converse(self.plugin, flat).answer)

    @pytest.mark.parametrize("value", [0.0, -1.0, 1e300], ids=["zero", "negative", "huge"])
    def test_survives_measurements_that_tell_nothing(self, value: float, uneven: Problem) -> None:
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


def _assert_fair(talk: Talk, space: Space) -> None:
    for query in (q for ask in talk.asks for q in ask):
        assert space.is_feasible(query.allocation) or (query.probe and space.is_probe(query.allocation)), query
    assert space.is_feasible(talk.answer)
