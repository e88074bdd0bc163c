from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from prunekit import Budget, Space
from prunekit.testing import converse
from prunekit.testing.spaces import additive, problem, rough_table, sites_of, small_llama
from prunekit_strategies.allocators.drop import Drop
from prunekit_strategies.allocators.removals import settled
from prunekit_strategies.signals.influence import Influence


def toy(blocks=4, share=0.5, seed=0, attention=(4, 48), mlp=(16, 16), **budget):
    """Sub-layers of like prices: 192 and 256."""
    sites = sites_of(blocks, attention=attention, mlp=mlp)
    space = Drop().first_space(Space.whole(sites, Budget.keeping(share, sites, **budget)))
    return problem(space, rough_table(space, seed))


def interacting(toy):
    """What a removal costs depends on what is gone: neighbours miss each other."""
    own = additive(toy.errors, toy.space)

    def loss(allocation):
        gone = [kept == 0 for kept in allocation]
        return own(allocation) + sum(0.7 * a * b for a, b in pairwise(gone))

    return loss


def gone(allocation):
    return {i for i, kept in enumerate(allocation) if kept == 0}


def test_every_removal_is_the_best_of_all_that_are_left_and_none_comes_back():
    here = toy()
    loss, talk = interacting(here), converse(Drop(compete=False), here, interacting(here))
    before = frozenset()
    for ask in talk.asks[:-1]:
        ways = [gone(q.allocation) for q in ask]
        assert ways == [before | {i} for i in range(8) if i not in before]
        before = gone(min((q.allocation for q in ask), key=loss))
    assert gone(talk.answer) == before


def test_so_many_questions_are_asked():
    talk = converse(Drop(compete=False), toy(attention=(4, 48), mlp=(12, 16)))  # all of one price: half of eight go
    assert [len(ask) for ask in talk.asks] == [8, 7, 6, 5, 1]
    assert [len(ask) for ask in converse(Drop(order="once", compete=False), toy()).asks] == [8, 1]


def test_the_best_pair_bounds_it():
    here = toy(attention=(4, 48), mlp=(12, 16), share=0.75)
    loss = interacting(here)
    answer = converse(Drop(compete=False), here, loss).answer
    pairs = [tuple(0 if i in pair else k for i, k in enumerate((4, 12) * 4)) for pair in combinations(range(8), 2)]
    assert len(gone(answer)) == 2
    assert min(map(loss, pairs)) <= loss(answer) <= sorted(map(loss, pairs))[14]


def test_at_once_the_least_missed_go():
    here = toy(attention=(4, 48), mlp=(12, 16))
    alone = [row[0] - row[1] for row in here.errors]
    assert gone(converse(Drop(order="once", compete=False), here).answer) == set(
        sorted(range(8), key=alone.__getitem__)[:4]
    )


def test_blocks_go_as_a_whole():
    for order in ("greedy", "once"):
        left = gone(converse(Drop(unit="blocks", order=order, compete=False), toy()).answer)
        assert left == {i for i in range(8) if i // 2 in {j // 2 for j in left}}
        assert len(left) == 4


def test_scores_are_summed_over_a_unit_and_nobody_is_asked():
    drop = Drop(unit="blocks", order="once", by="scores", compete=False)
    scores = tuple(tuple(float(block == 2) for _ in range(n)) for block in (3, 2, 1, 0) for n in (4, 16))
    talk = converse(drop, replace(toy(share=0.25), scores=scores))
    assert talk.asks == ()
    assert gone(talk.answer) == {0, 1, 4, 5, 6, 7}


def test_what_turns_the_stream_least_goes_and_nobody_is_asked():
    turned = (0.9, 0.4, 0.1, 0.5, 0.2, 0.6, 0.8, 0.3)  # at the mlp, last of a block, that of the block
    here = replace(toy(mlp=(12, 16)), signals=(turned,))
    once = {"order": "once", "by": "influence", "compete": False}
    blocks, alone = Drop(unit="blocks", **once), Drop(**once)
    talk = converse(blocks, here)
    assert (gone(talk.answer), talk.asks) == ({0, 1, 6, 7}, ())
    assert gone(converse(alone, here).answer) == {2, 4, 7, 1}
    assert [drop.signals for drop in (blocks, alone)] == [(Influence("block"),), (Influence(),)]
    assert Drop().signals == ()


def test_per_price_prefers_what_saves_more():
    here = toy(attention=(4, 10), mlp=(16, 50), share=0.9)
    loss = additive(tuple((1.0, 0.0) if i % 2 else (0.9, 0.0) for i in range(8)), here.space)
    assert gone(converse(Drop(compete=False), here, loss).answer) == {0, 2, 4, 6, 1}
    assert gone(converse(Drop(per_price=True, compete=False), here, loss).answer) == {1}


def test_kinds_that_do_not_trade_both_come_down():
    answer = converse(Drop(compete=False), toy(apart=True)).answer
    assert sum(i % 2 for i in gone(answer)) == 2
    assert len(gone(answer)) == 4


@pytest.mark.parametrize("share", [0.3, 0.45, 0.5, 0.77, 0.95])
def test_what_is_left_over_gives_back_one_sub_layer_or_a_part_of_it(share):
    whole = small_llama(share)
    drop = Drop(compete=False)
    here = problem(drop.first_space(whole), seed=3)
    best = converse(drop, here).answer
    plan = tuple(kept for (kept,) in drop.last_space(whole, best).ladders)
    assert gone(plan) <= gone(best)
    assert len(gone(best) - gone(plan)) <= 2
    assert all(b == p for i, (b, p) in enumerate(zip(best, plan, strict=True)) if i not in gone(best))
    assert 0 <= whole.budget.limit - whole.cost(plan) < 768  # the price of a neuron
    assert settled(whole, plan) == plan


def test_nothing_is_asked_where_nothing_need_go():
    talk = converse(Drop(compete=False), toy(share=1.0))
    assert [len(ask) for ask in talk.asks] == [1]
    assert not gone(talk.answer)


def test_scores_have_one_order():
    with pytest.raises(ValueError, match="order: once"):
        Drop(by="scores")
    with pytest.raises(ValueError, match="influence of a unit"):
        Drop(by="influence")
