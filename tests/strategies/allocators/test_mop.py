from dataclasses import replace

import pytest

from prunekit.testing import converse
from prunekit.testing.spaces import problem, small_llama
from prunekit_strategies.allocators.mop import MixtureOfPruners

PAPER = MixtureOfPruners(compete=False)


def gone(allocation):
    return {b for b in range(8) if allocation[2 * b] == allocation[2 * b + 1] == 0}


def talk_of(allocator=PAPER, share=0.5, loss=None):
    toy = problem(allocator.first_space(small_llama(share)))
    return converse(allocator, toy, loss), toy.space


def test_both_branches_have_one_size_and_the_better_goes_on():
    talk, space = talk_of()
    assert [len(ask) for ask in talk.asks] == [2, 2, 2, 2, 1]  # half of eight blocks
    full, step = 8 * 786_432, 786_432
    for t, ask in enumerate(talk.asks[:-1], 1):
        for query in ask:
            assert 0 <= full - t * step - space.cost(query.allocation) < 2 * 49_152  # rungs of 1/32, and heads


def depth_first(allocation):
    return -len(gone(allocation)), sum(allocation)


@pytest.mark.parametrize("prefers", ["depth", "width"])
def test_either_branch_alone_is_depth_or_width_pruning(prefers):
    sign = -1.0 if prefers == "depth" else 1.0
    talk, _ = talk_of(loss=lambda a: sign * len(gone(a)))
    assert gone(talk.answer) == ({2, 3, 4, 5} if prefers == "depth" else set())  # always the third last of those left
    if prefers == "width":
        mlp = talk.answer[1::2]
        assert max(mlp) - min(mlp) <= 24  # a rung


def test_branches_may_take_turns():
    wanted = iter([1, 1, 2, 2])
    now = {"gone": 0}

    def loss(allocation):
        return abs(len(gone(allocation)) - now["gone"]) + 1e-9 * sum(allocation)

    allocator = PAPER
    toy = problem(allocator.first_space(small_llama(0.5)))
    search, losses, sizes = allocator.search(toy), None, []
    try:
        while True:
            queries = next(search) if losses is None else search.send(losses)
            now["gone"] = next(wanted, now["gone"])
            losses = [loss(q.allocation) for q in queries]
            sizes.append(len(gone(min(zip(losses, [q.allocation for q in queries], strict=True))[1])))
    except StopIteration as stop:
        answer = stop.value
    assert sizes == [1, 1, 2, 2, 2]
    assert gone(answer) == {4, 5}
    widths = {kept for b in range(8) if b not in gone(answer) for kept in [answer[2 * b + 1]]}
    assert max(widths) < 768


def test_a_sequence_may_be_drawn():

    toy = problem(PAPER.first_space(small_llama(0.5)))
    drawn = MixtureOfPruners(branch="random", compete=False)
    answers = {converse(drawn, replace(toy, seed=seed)).answer for seed in range(12)}
    assert {len(gone(answer)) for answer in answers} >= {1, 2, 3}
    assert [len(ask) for ask in converse(drawn, toy).asks] == [1]


def test_the_block_that_is_missed_least_may_go_in_the_place_of_a_late_one():
    talk, _ = talk_of(MixtureOfPruners(block="best", compete=False), loss=lambda a: -1.0 * (a[2] == a[3] == 0))
    assert len(talk.asks[0]) == 9
    assert 1 in gone(talk.answer)


@pytest.mark.parametrize("share", [0.3, 0.62, 0.9])
def test_what_is_built_spends_the_budget_and_revives_no_block(share):
    whole = small_llama(share)
    talk, _ = talk_of(share=share, loss=lambda a: -1.0 * len(gone(a)))
    plan = tuple(kept for (kept,) in PAPER.last_space(whole, talk.answer).ladders)
    assert gone(plan) == gone(talk.answer)
    assert 0 <= whole.budget.limit - whole.cost(plan) < 768


def test_nothing_goes_where_nothing_need_go():
    talk, space = talk_of(share=1.0)
    assert talk.answer == tuple(ladder[-1] for ladder in space.ladders)
