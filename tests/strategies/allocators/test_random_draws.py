from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from prunekit import Budget, Space
from prunekit.testing import converse
from prunekit.testing.spaces import ZOO, problem, sites_of, small_llama
from prunekit_strategies.allocators.random_draws import RandomDraws


def test_every_tight_allocation_is_drawn_and_no_other():
    sites = sites_of(2, attention=(2, 5), mlp=(6, 3))
    toy = problem(Space.whole(sites, Budget.keeping(0.5, sites)))
    drawn = {q.allocation for q in converse(RandomDraws(draws=500), toy).asks[0]}
    assert drawn == {a for a in product(*toy.space.ladders) if toy.space.is_feasible(a) and a == toy.space.nearest(a)}
    assert len(drawn) > 20


def test_sites_that_are_alike_are_drawn_alike():
    toy = ZOO["even"]()
    counts = [Counter() for _ in toy.space.sites]
    for seed in range(150):
        _, drawn = (q.allocation for q in converse(RandomDraws(draws=1), replace(toy, seed=seed)).asks[0])
        for counter, kept in zip(counts, drawn, strict=True):
            counter[kept] += 1
    means = [sum(k * n for k, n in c.items()) / c.total() for c in counts]
    assert means == pytest.approx([2.0] * 4, abs=0.4)
    assert all(set(c) == {0, 1, 2, 3, 4} for c in counts)


def test_a_smaller_reach_stays_near_the_start():
    toy = problem(small_llama())
    near, far = (
        {q.allocation for q in converse(RandomDraws(draws=50, reach=reach), toy).asks[0]} for reach in (0.1, 1.0)
    )

    def stray(drawn):
        return max(abs(a - b) for allocation in drawn for a, b in zip(allocation[1::2], toy.start[1::2], strict=True))

    assert stray(near) <= 2 * 0.1 * 768 < stray(far)


def test_asks_its_draws_once_and_the_best_again_on_everything():
    toy = problem(small_llama())
    draws, finals = converse(RandomDraws(draws=30, finalists=3), toy).asks
    assert len(draws) == 31
    assert {q.tokens for q in draws} == {8_192}
    assert {q.tokens for q in finals} == {None}
    assert toy.start in {q.allocation for q in finals}
    assert 3 <= len(finals) <= 4


def test_where_the_start_does_not_compete_a_draw_is_the_answer():
    toy = problem(small_llama())
    answers = set()
    for seed in range(4):
        talk = converse(RandomDraws(draws=1, compete=False), replace(toy, seed=seed))
        assert [[q.allocation for q in asked] for asked in talk.asks] == [[talk.answer]]
        assert toy.space.is_feasible(talk.answer)
        answers.add(talk.answer)
    assert len(answers) == 4
    assert toy.start not in answers
