from itertools import product
from math import prod

import numpy as np
import pytest

from prunekit import Budget, Space
from prunekit.testing import converse
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, sites_of, small_llama
from prunekit_strategies.allocators.policy_gradient import (
    PolicyGradient,
    entropy_gradient,
    gradient,
    shifted,
    softmax,
)

THETA = [np.array([0.3, -1.0, 0.5]), np.array([0.0, 0.7])]
DRAWS = list(product(range(3), range(2)))


def loss(rungs):
    return [[1.0, -2.0], [0.5, 4.0], [3.0, 0.1]][rungs[0]][rungs[1]]  # not additive


def expected(theta):
    pi = [softmax(t) for t in theta]
    return sum(prod(p[r] for p, r in zip(pi, rungs, strict=True)) * loss(rungs) for rungs in DRAWS)


def numeric(function):
    """Central differences over every logit."""
    slope = []
    for i, t in enumerate(THETA):
        slope.append(np.zeros_like(t))
        for r in range(len(t)):
            high, low = ([x.copy() for x in THETA] for _ in range(2))
            high[i][r] += 1e-5
            low[i][r] -= 1e-5
            slope[i][r] = (function(high) - function(low)) / 2e-5
    return slope


@pytest.mark.parametrize("draws", [2, 3])
def test_the_estimate_is_unbiased_by_enumeration_of_all_draws(draws):
    pi = [softmax(t) for t in THETA]
    chance = {rungs: prod(p[r] for p, r in zip(pi, rungs, strict=True)) for rungs in DRAWS}
    mean = [np.zeros_like(t) for t in THETA]
    for drawn in product(DRAWS, repeat=draws):
        weight = prod(chance[rungs] for rungs in drawn)
        estimate = gradient(pi, drawn, np.array([loss(r) for r in drawn]))
        mean = [m + weight * g for m, g in zip(mean, estimate, strict=True)]
    for found, true in zip(mean, numeric(expected), strict=True):
        assert found == pytest.approx(true, abs=1e-8)


def test_a_constant_loss_has_no_gradient_and_a_common_shift_changes_nothing():
    pi, drawn, losses = [softmax(t) for t in THETA], DRAWS[:4], np.array([1.0, 2.0, 4.0, -3.0])
    assert all(np.abs(g).max() < 1e-15 for g in gradient(pi, drawn, np.full(4, 7.0)))
    for a, b in zip(gradient(pi, drawn, losses), gradient(pi, drawn, losses + 5), strict=True):
        assert a == pytest.approx(b)


def test_the_gradient_of_the_entropy():
    def entropy(theta):
        return -sum(float(p @ np.log(p)) for p in map(softmax, theta))

    for found, true in zip(entropy_gradient([softmax(t) for t in THETA]), numeric(entropy), strict=True):
        assert found == pytest.approx(true, abs=1e-8)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_expected_price_is_the_budget(share, apart):
    sites = sites_of(3, attention=(4, 10), mlp=(16, 3))
    space = Space.whole(sites, Budget.keeping(share, sites, apart=apart))
    rng = np.random.default_rng(0)
    pi = shifted([rng.normal(size=len(ladder)) for ladder in space.ladders], space)
    for members, limit in space.partitions:
        assert sum(float(pi[i] @ np.array(space.prices[i])) for i in members) == pytest.approx(limit)
    assert all(p.sum() == pytest.approx(1) for p in pi)


def test_what_is_on_budget_is_not_shifted():
    toy = ZOO["even"]()
    pi = shifted([np.zeros(5)] * 4, toy.space)  # 4 sites of 0..4 at 8: the mean is 2
    assert all(p == pytest.approx([0.2] * 5) for p in pi)


def test_it_learns_what_the_table_does_not_know():
    toy = problem(PolicyGradient().first_space(small_llama()), seed=0)
    hidden = additive(convex_table(toy.space, seed=1), toy.space)
    few, many = (hidden(converse(PolicyGradient(steps=n, warm_start="errors"), toy, hidden).answer) for n in (1, 40))
    seed = hidden(toy.space.lowest(toy.errors))
    assert many < few
    assert many < min(seed, hidden(toy.start))


def test_answers_the_best_it_met_judged_on_everything():
    toy = problem(PolicyGradient().first_space(small_llama()))
    talk = converse(PolicyGradient(steps=5, warm_start="errors"), toy)
    assert {q.tokens for q in talk.asks[-1]} == {None}
    assert talk.answer in {q.allocation for q in talk.asks[-1]}
    assert {q.tokens for ask in talk.asks[:-1] for q in ask} == {4_096}
