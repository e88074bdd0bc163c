"""A table fitted to what several searches have judged: whose order it has, and what it does not depend on."""

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from prunekit import Searched, Space
from prunekit.space.budgets import Budget
from prunekit.testing import best_allocation
from prunekit.testing.spaces import convex_table, problem, sites_of
from prunekit_strategies.fitted_table import between, fitted, optima

SITES = sites_of(4, attention=(4, 40), mlp=(16, 30))
LEARNT, UNSEEN = (0.3, 0.45, 0.6, 0.75), (0.375, 0.525, 0.675)


def space_of(share, **options):
    return Space.whole(SITES, Budget.keeping(share, SITES, **options))


def factors(seed):
    """u and v of every site."""
    rng = random.Random(seed)
    return [(rng.uniform(-1, 1), rng.uniform(-1, 1)) for _ in SITES]


TRUTH = [
    tuple(t * math.exp(u + v * (0.5 - k / site.n_groups)) for k, t in zip(ladder, row, strict=True))
    for (u, v), site, ladder, row in zip(
        factors(1), SITES, space_of(0.5).ladders, convex_table(space_of(0.5)), strict=True
    )
]


def loss(allocation):
    return sum(row[kept] for row, kept in zip(TRUTH, allocation, strict=True))


def searches(change=lambda share, loss: loss, judged=24, nats=True):
    """Draws around the optimum of a table that is wrong by factors, judged by the truth."""
    found = []
    for share in LEARNT:
        space, rng = space_of(share), random.Random(0)
        given = replace(problem(space), nats=convex_table(space) if nats else None)
        centre, _ = best_allocation(space, convex_table(space))
        draws = [space.nearest([k + rng.gauss(0, 0.2) * s.n_groups for k, s in zip(centre, SITES, strict=True)])
                 for _ in range(judged)]  # fmt: skip
        pairs = sorted(((a, change(share, loss(a))) for a in dict.fromkeys(draws)), key=lambda pair: pair[1])
        found.append(Searched(space, tuple(pairs), (1_024,) * len(pairs), given))
    return found


def fit(*arguments, **options):
    """A table fitted to `searches`, where there is one."""
    table = fitted(searches(*arguments, **options))
    assert table is not None
    return table


def above(table, share):
    """How far the optimum of a table is above that of the truth, as a share of the truth's."""
    space = space_of(share)
    return loss(best_allocation(space, table)[0]) / best_allocation(space, TRUTH)[1] - 1


@pytest.fixture(scope="module")
def table():
    return fit()


@pytest.mark.parametrize("share", UNSEEN)
def test_what_was_judged_under_some_budgets_has_the_order_of_others(table, share):
    given = convex_table(space_of(share))
    assert table.kept == space_of(share).ladders
    assert above(given, share) > 0.05
    assert above(table.losses, share) < 0.005


def test_factors_are_found_where_nothing_else_is_wrong(table):
    wanted = [row[2] / TRUTH[1][8] for row in TRUTH]  # a table has no unit
    assert [row[2] / table.losses[1][8] for row in table.losses] == pytest.approx(wanted, rel=0.1)


def test_the_level_of_a_budget_is_free_and_so_is_the_unit(table):
    other = fit(lambda share, loss: loss * (7.0 if share > 0.5 else 0.1))
    for one, two in zip(table.losses, other.losses, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("change", [lambda _, loss: loss**1.5, lambda _, loss: 0.3 + loss])
def test_a_loss_that_grows_in_another_way_has_the_same_order(change):
    table = fit(change)
    for share in UNSEEN:
        assert above(table.losses, share) < 0.4 * above(convex_table(space_of(share)), share)


def test_no_site_gains_from_losing_groups(table):
    for row in table.losses:
        assert list(row) == sorted(row, reverse=True)


def test_without_prices_in_nats_errors_are_bent():
    table = fit(nats=False)
    assert max(above(table.losses, share) for share in UNSEEN) < 0.005


def test_nothing_is_fitted_to_losses_without_logarithms_or_searches_that_do_not_say_what_they_were_given():
    assert fitted([replace(each, problem=None) for each in searches()]) is None
    assert fitted(searches(lambda _, loss: -loss)) is None
    assert fitted(searches(judged=1)) is None


def test_optima_spend_budgets_from_the_least_to_the_largest(table):
    some = [Searched(space_of(share), ()) for share in (0.6, 0.3, 0.4)]
    found = optima(some, table, 7)
    limits = [space.budget.limit for space, _ in found]
    assert limits[0] == space_of(0.3).budget.limit
    assert limits[-1] == space_of(0.6).budget.limit
    steps = [b - a for a, b in pairwise(limits)]
    assert max(steps) - min(steps) <= 1
    for space, allocation in found:
        assert space.is_feasible(allocation)
        assert space.nearest([float(kept) for kept in allocation]) == allocation
        assert sum(row[k] for row, k in zip(table.losses, allocation, strict=True)) == pytest.approx(
            best_allocation(space, table.losses)[1], rel=0.01
        )


def test_between_two_budgets_kinds_lie_between_theirs():
    low, high = space_of(0.4, apart=True), space_of(0.8, apart=True)
    half = between(low, high, 0.5).budget
    wanted = dict(space_of(0.6, apart=True).budget.by_kind)
    assert half.limit == sum(limit for _, limit in half.by_kind)
    for kind, limit in half.by_kind:
        assert abs(limit - wanted[kind]) <= 1
