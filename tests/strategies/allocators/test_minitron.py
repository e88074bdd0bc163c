from dataclasses import replace
from itertools import combinations

import pytest

from prunekit import Budget, Space
from prunekit.testing import converse
from prunekit.testing.spaces import additive, problem, rough_table, sites_of, small_llama
from prunekit_strategies.allocators.minitron import Minitron
from prunekit_strategies.signals.influence import Influence

PAPER = Minitron(compete=False)


def whole_of(share, blocks=5, attention=(4, 30), mlp=(10, 20), **budget):
    """Sub-layers of 120 and 200: a block is 320, the model 1,600."""
    sites = sites_of(blocks, attention=attention, mlp=mlp)
    return Space.whole(sites, Budget.keeping(share, sites, **budget))


def gone(plan):
    return {i // 2 for i in range(0, len(plan), 2) if plan[i] == plan[i + 1] == 0}


def tight(whole, plan):
    """Whether neither all heads nor all neurons of the blocks that stay can be one more."""
    for kind in (0, 1):
        more = tuple(kept + (i % 2 == kind and i // 2 not in gone(plan)) for i, kept in enumerate(plan))
        if max(more[kind::2]) <= whole.ladders[kind][-1] and whole.cost(more) <= whole.budget.limit:
            return False
    return True


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.72])
def test_the_answer_is_the_best_of_all_sets_of_blocks_and_all_equal_widths_that_spend_the_budget(share, seed):
    """Brute force: every set of blocks that may go, and every pair of a number of heads and one of neurons that fits
    and of which none can be raised on the path from the uniform one. Losses are additive over blocks."""
    whole = whole_of(share)
    here = problem(PAPER.first_space(whole), rough_table(PAPER.first_space(whole), seed))
    loss, top = additive(here.errors, here.space), tuple(ladder[-1] for ladder in whole.ladders)
    answer = converse(PAPER, here, loss).answer
    over = whole.cost(top) - whole.budget.limit
    candidates = {}
    for depth in (0.0, 0.25, 0.5):
        many = min(round(depth * over / 320), over // 320)
        plans = [
            tuple(0 if i // 2 in out else counts[i % 2] for i in range(10))
            for out in combinations(range(5), many)
            for counts in [_counts_of(here.space, whole, many)]
        ]
        assert all(whole.cost(plan) <= whole.budget.limit and tight(whole, plan) for plan in plans)
        alone = [loss(tuple(0 if i // 2 == b else k for i, k in enumerate(top))) for b in range(5)]
        candidates[depth] = min(plans, key=lambda plan: sum(alone[b] for b in gone(plan)))
    assert loss(answer) == min(map(loss, candidates.values()))
    assert answer in candidates.values()


def _counts_of(space, whole, many):
    """The counts of the space under which so many blocks may go: of tight pairs, that of the most equal shares."""
    fitting = [
        (heads, neurons)
        for heads in space.ladders[0]
        for neurons in space.ladders[1]
        if heads and neurons and (5 - many) * (30 * heads + 20 * neurons) <= whole.budget.limit
    ]
    plans = [pair for pair in fitting if tight(whole, tuple(0 if i // 2 < many else pair[i % 2] for i in range(10)))]
    return min(plans, key=lambda pair: abs(pair[0] / 4 - pair[1] / 10))


def test_so_many_questions_are_asked():
    talk = converse(PAPER, problem(PAPER.first_space(whole_of(0.5))))
    assert [len(ask) for ask in talk.asks] == [5, 2], "each block alone; none or one go: half of 800 is 1.25 blocks"
    assert all(query.probe for query in talk.asks[0])
    assert [
        len(ask) for ask in converse(Minitron(0.0, compete=False), problem(PAPER.first_space(whole_of(0.5)))).asks
    ] == [1]


def test_depth_alone_takes_as_many_whole_blocks_as_may_go_and_widths_the_rest():
    whole = small_llama(0.4)
    deep = Minitron(1.0, compete=False)
    answer = converse(deep, problem(deep.first_space(whole), seed=1)).answer
    assert len(gone(answer)) == 4, "0.6 of 8 blocks are 4.8, and a fifth would save more than is asked"
    assert len({kept for i, kept in enumerate(answer) if i // 2 not in gone(answer)}) == 2
    assert deep.last_space(whole, answer).ladders == tuple((kept,) for kept in answer)


def test_what_equal_blocks_leave_goes_to_single_sites_where_that_is_asked():
    whole = small_llama(0.41)
    exact = Minitron(0.5, equal=False, compete=False)
    answer = converse(exact, problem(exact.first_space(whole), seed=1)).answer
    plan = tuple(kept for (kept,) in exact.last_space(whole, answer).ladders)
    assert gone(plan) == gone(answer)
    assert 0 <= whole.budget.limit - whole.cost(plan) < 768, "the price of a neuron"
    assert whole.cost(plan) > whole.cost(answer)


def test_blocks_of_least_influence_go_without_a_question():
    by = Minitron(0.5, by="influence", compete=False)
    (signal,) = by.signals
    assert signal == Influence("block")
    whole = small_llama(0.4)
    turned = tuple(1.0 / (1 + i) for i in range(len(whole.sites)))  # the later, the less
    here = replace(problem(by.first_space(whole), seed=1), signals=(turned,))
    talk = converse(by, here)
    assert gone(talk.answer) == {b for b in range(8) if b >= 8 - len(gone(talk.answer))} != set()
    assert [len(ask) for ask in talk.asks] == [1], "the candidate alone, for the ledger"


def test_where_nothing_need_go_all_stays():
    talk = converse(PAPER, problem(PAPER.first_space(whole_of(1.0))))
    assert talk.answer == (4, 10) * 5
    assert [len(ask) for ask in talk.asks] == [1]


@pytest.mark.parametrize(
    "wrong", [{"depth": -0.1}, {"depth": 1.1}, {"depth": (0.5, 0.5)}, {"depth": ()}, {"tokens": 0}]
)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"depth is a share|tokens is at least 1"):
        Minitron(**wrong)
