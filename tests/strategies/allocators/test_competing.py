from dataclasses import replace

import pytest

from prunekit.plugins.allocator import Journal
from prunekit.testing import converse
from prunekit.testing.allocators import furnished
from prunekit.testing.spaces import problem, small_llama
from prunekit_strategies.allocators.competing import best_of
from prunekit_strategies.allocators.global_rank import GlobalRank
from prunekit_strategies.allocators.metric_map import OWL
from prunekit_strategies.allocators.schedule import Schedule


class Pad(Journal):
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def told(allocator, loss):
    """(its answer, the start, what was noted)."""
    pad = Pad()
    given = replace(furnished(problem(small_llama(0.5)), allocator, seed=1), journal=pad)
    return converse(allocator, given, lambda a: loss(a, given)).answer, given.start, pad.lines


@pytest.mark.parametrize("allocator", [OWL(), GlobalRank(), Schedule()], ids=lambda a: type(a).__name__)
def test_an_allocator_whose_answer_loses_against_the_start_says_so(allocator):
    name = type(allocator).__name__
    answer, start, lines = told(allocator, lambda a, given: 1.0 if a == given.start else 1.5)
    assert answer == start
    assert lines == [f"{name}: the start has won, its loss 1 against 1.5; with compete: false the other is taken"]
    answer, start, lines = told(allocator, lambda a, given: 2.0 if a == given.start else 1.5)
    assert answer != start
    assert lines == [f"{name}: its own answer has won, the start's loss 2 against 1.5"]
    answer, start, lines = told(replace(allocator, compete=False), lambda a, given: 1.0 if a == given.start else 1.5)
    assert answer != start
    assert not lines


def test_an_answer_that_is_the_start_is_said_to_be():
    pad = Pad()
    given = replace(problem(small_llama(0.5)), journal=pad)
    assert best_of("Map", given, [given.start], [1.0]) == given.start
    assert pad.lines == ["Map: its own answer is the start"]
