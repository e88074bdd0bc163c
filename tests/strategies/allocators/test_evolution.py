from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from prunekit import Allocation, Objective, Problem, Query
from prunekit.search import conversation as search
from prunekit.search.conversation import Outcome
from prunekit.search.ledger import Ledger
from prunekit.system.progress import Progress
from prunekit.testing import best_allocation, converse, toy_supernet, toy_tokens
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, rough_table, small_llama
from prunekit_strategies.allocators.evolution import Evolution

COLD = Evolution(warm_start="none")


@pytest.mark.parametrize("seed", range(5))
def test_reaches_brute_force_on_four_sites_of_five_rungs(seed: int) -> None:
    even = ZOO["even"]()
    even = replace(even, errors=rough_table(even.space, seed), seed=seed)
    loss = additive(even.errors, even.space)
    assert loss(converse(COLD, even).answer) == pytest.approx(best_allocation(even.space, even.errors)[1])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_is_within_one_percent_of_the_optimum(seed: int, share: float) -> None:
    whole = small_llama(share)
    toy = problem(Evolution().first_space(whole), seed=seed)
    loss = additive(toy.errors, toy.space)
    assert loss(converse(Evolution(), toy).answer) <= 1.01 * best_allocation(toy.space, toy.errors)[1]


def test_finds_what_the_table_does_not_know() -> None:
    toy = problem(Evolution().first_space(small_llama()), seed=0)
    hidden = convex_table(toy.space, seed=1)  # the objective has other weights than the table
    loss = additive(hidden, toy.space)
    found, optimum = loss(converse(Evolution(), toy, loss).answer), best_allocation(toy.space, hidden)[1]
    assert found - optimum < 0.1 * (loss(toy.start) - optimum)


def test_a_warm_start_asks_less_for_as_much() -> None:
    toy = problem(Evolution().first_space(small_llama()))
    loss = additive(toy.errors, toy.space)
    warm, cold = converse(Evolution(), toy), converse(COLD, toy)
    assert loss(warm.answer) <= loss(cold.answer)
    assert len(warm.asks) < len(cold.asks)


def test_probes_begin_near_an_optimum_the_errors_do_not_know():
    toy = problem(Evolution().first_space(small_llama()), seed=0)
    weights = [1.0 + i % 5 for i in range(len(toy.space.sites))]
    hidden = tuple(tuple(w * e for e in row) for w, row in zip(weights, toy.errors, strict=True))
    loss, optimum = additive(hidden, toy.space), best_allocation(toy.space, hidden)[1]
    talk = converse(Evolution(generations=0), toy, loss)
    assert loss(talk.answer) <= 1.01 * optimum < loss(toy.space.lowest(toy.errors))
    probes, parents = talk.asks
    assert {q.tokens for q in probes} == {1_024}
    assert all(q.probe for q in probes)
    assert len(parents) == 2


def test_the_parent_only_meets_the_finalists_and_never_gets_worse() -> None:
    toy = ZOO["uneven"]()
    loss = additive(toy.errors, toy.space)
    asks = converse(Evolution(selections=((3, 10), (1, 100)), warm_start="none"), toy).asks[1:]
    few, many = asks[::2], asks[1::2]
    assert {q.tokens for ask in few for q in ask} == {10}
    assert {q.tokens for ask in many for q in ask} == {100}
    parents = [loss(ask[-1].allocation) for ask in many]
    assert all(len(ask) <= 4 for ask in many)
    assert parents == sorted(parents, reverse=True)


def test_stages_that_would_see_the_same_tokens_are_one() -> None:
    toy = replace(ZOO["uneven"](), tokens=1_000)
    asks = converse(COLD, toy).asks
    assert {q.tokens for ask in asks for q in ask} == {512, 1_000}
    assert {q.tokens for ask in converse(COLD, replace(toy, tokens=0)).asks for q in ask} == {None}


def test_stops_when_nothing_improves() -> None:
    toy = problem(Evolution().first_space(small_llama()))
    talk = converse(Evolution(patience=3, warm_start="none"), toy, lambda _: 1.0)
    assert talk.answer == toy.start
    assert len(talk.asks) == 1 + 3 * 3  # the start, then three generations of three stages


def test_asks_every_neighbour_before_it_gives_up() -> None:
    even = ZOO["even"]()
    talk = converse(
        Evolution(exchanges=1, warm_start="none", selections=((1, 1),), patience=99, filter=1), even, lambda _: 1.0
    )
    assert talk.asked == {even.start, *even.space.swaps(even.start)}


def test_trades_a_dear_group_for_many_cheap_ones_and_back() -> None:
    toy = ZOO["uneven"]()

    def attention(allocation: Allocation) -> float:
        return float(sum(allocation[::2]))

    most = converse(COLD, toy, lambda a: -attention(a)).answer
    least = converse(COLD, toy, attention).answer
    assert attention(most) == 12
    assert attention(least) == 0


def test_asks_the_start_first() -> None:
    toy = ZOO["uneven"]()
    assert converse(COLD, toy).asks[0] == (Query(toy.start, 16_384),)


def test_without_a_filter_it_asks_what_it_asked_before_there_was_one() -> None:
    def digest(evolution: Evolution) -> str:
        asks = converse(evolution, ZOO["uneven"]()).asks
        return sha256(repr([[(q.allocation, q.tokens) for q in ask] for ask in asks]).encode()).hexdigest()[:16]

    assert digest(Evolution(generations=12, filter=1)) == "afdab405d3690eeb"
    assert digest(Evolution(generations=12, filter=1, warm_start="none")) == "bc290fde7d7e655f"


def test_a_filter_judges_as_many_and_finds_more() -> None:
    toy = problem(Evolution().first_space(small_llama()), seed=0)
    found: dict[int, float] = {}
    for filter_ in (1, 8):
        found[filter_] = 0.0
        for seed in range(4):
            loss = additive(convex_table(toy.space, seed=seed + 1), toy.space)
            talk = converse(
                Evolution(generations=8, warm_start="errors", filter=filter_), replace(toy, seed=seed), loss
            )
            found[filter_] += loss(talk.answer) / loss(toy.start)
            assert all(len(ask) <= 8 for ask in talk.asks)
    assert found[8] < 0.98 * found[1]


def test_a_search_that_goes_on_from_its_ledger_asks_nothing_anew(tmp_path: Path) -> None:
    net, tokens, asked = toy_supernet(), toy_tokens(), []

    class Uneven(Objective):
        """Not additive, and counts."""

        def loss(self, net, allocation, batch):
            asked.append(allocation)
            errors = net.site_errors(allocation)
            return sum(errors) + max(errors) + 0.01 * batch.n_tokens

    def held() -> Outcome:
        start = Problem(net.space, net.errors, net.space.uniform(), tokens=tokens.n_tokens)
        evolution = Evolution(generations=5, selections=((2, 12), (1, 48)))
        return search.converse(
            evolution, start, net, Uneven(), tokens, Ledger(tmp_path / "l"), pass_number=0, progress=Progress()
        )  # fmt: skip

    first, questions = held(), len(asked)
    assert held() == first
    assert len(asked) == questions > 0
