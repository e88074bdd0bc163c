from dataclasses import replace

import pytest

from prunekit import Allocator, Space
from prunekit.plugins.registry import ALLOCATORS
from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import additive, convex_table, problem, small_llama
from prunekit_strategies.allocators.evolution import Evolution
from prunekit_strategies.allocators.tyr import CoarseToFine
from prunekit_strategies.allocators.uniform import Uniform


def rounds(allocator: Allocator, whole: Space, seed: int = 0) -> list[tuple[Space, float]]:
    """(space, loss of the answer) per round on one convex table; every round starts from the last answer."""
    space, best, found = allocator.first_space(whole), None, []
    while space is not None:
        toy = problem(space, convex_table(space, seed), seed)
        if best is not None:
            toy = replace(toy, start=space.nearest(best))
        best = converse(allocator, toy).answer
        found.append((space, additive(toy.errors, space)(best)))
        space = allocator.next_space(space, best)
    return found


def test_halves_the_stride_from_an_eighth_to_a_sixty_fourth() -> None:
    spaces = [space for space, _ in rounds(CoarseToFine(Uniform()), small_llama())]
    assert [s.stride for s in spaces] == [1 / 8, 1 / 16, 1 / 32, 1 / 64]
    mlp = [s.ladders[1] for s in spaces]
    assert mlp[0] == tuple(range(0, 769, 96))  # the whole range
    assert [ladder[1] - ladder[0] for ladder in mlp] == [96, 48, 24, 12]
    assert [len(ladder) for ladder in mlp[1:]] == [9, 9, 9]
    assert all(s.ladders[0] == (0, 1, 2, 3, 4) for s in spaces)  # never less than one group


@pytest.mark.parametrize("inner", [Evolution(), Evolution(warm_start="none")], ids=["warm", "cold"])
def test_every_round_is_at_least_as_good_and_the_last_within_one_percent_of_the_optimum(inner: Evolution) -> None:
    losses = [loss for _, loss in rounds(CoarseToFine(inner), small_llama())]
    assert losses == sorted(losses, reverse=True)
    fine = small_llama().zoomed((2, 384) * 8, stride=1 / 64, reach=64)
    assert losses[-1] <= 1.01 * best_allocation(fine, convex_table(fine))[1]


def test_an_odd_stride_still_reaches_both_ends() -> None:
    space = CoarseToFine(stride=0.3, last_stride=0.1).first_space(small_llama())
    assert space.ladders[1][0] == 0
    assert space.ladders[1][-1] == 768


def test_it_asks_for_what_the_one_inside_asks_for():
    ranked = CoarseToFine(inner=ALLOCATORS.build("global-rank"))
    assert ranked.needs == {"scores"}
    mapped = ALLOCATORS.build("owl")
    assert CoarseToFine(inner=mapped).signals == mapped.signals != ()
