from dataclasses import replace

from prunekit.testing import converse
from prunekit.testing.spaces import problem, small_llama
from prunekit_strategies.allocators.uniform import Uniform


def test_has_one_rung_per_site_and_asks_once() -> None:
    space = Uniform().first_space(small_llama())
    assert space.ladders == ((2,), (384,)) * 8
    talk = converse(Uniform(), problem(space))
    assert talk.answer == (2, 384) * 8
    assert len(talk.asks) == len(talk.asked) == 1


def test_equal_counts_leave_what_does_not_come_out_even() -> None:
    whole = small_llama()
    odd = replace(whole, budget=replace(whole.budget, limit=whole.budget.limit - 1))
    assert len({k for ladder in Uniform().first_space(odd).ladders for k in ladder}) == 3  # one site keeps less
    space = Uniform(equal=True).first_space(odd)
    assert space.ladders == ((2,), (383,)) * 8
    plan = converse(Uniform(equal=True), problem(space)).answer
    assert Uniform(equal=True).last_space(odd, plan).ladders == space.ladders
