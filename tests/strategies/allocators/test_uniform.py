from prunekit.testing import converse
from prunekit.testing.spaces import problem, small_llama
from prunekit_strategies.allocators.uniform import Uniform


def test_has_one_rung_per_site_and_asks_once() -> None:
    space = Uniform().first_space(small_llama())
    assert space.ladders == ((2,), (384,)) * 8
    talk = converse(Uniform(), problem(space))
    assert talk.answer == (2, 384) * 8
    assert len(talk.asks) == len(talk.asked) == 1
