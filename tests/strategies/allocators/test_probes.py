import math
from dataclasses import replace

import pytest

from prunekit.testing.spaces import ZOO, additive, convex_table, problem, rough_table, small_llama
from prunekit_strategies.allocators.probes import Probes


def asked(probes, toy, centre, loss):
    """(queries, table)"""
    search = probes.table(toy, centre)
    queries = next(search)
    try:
        search.send([loss(q.allocation) for q in queries])
    except StopIteration as stop:
        return queries, stop.value
    raise AssertionError


@pytest.fixture
def toy():
    whole = small_llama()
    return problem(whole.zoomed(whole.uniform(), stride=1 / 16, reach=16))


def test_every_rung_asked_is_the_loss_itself_less_that_of_the_centre(toy):
    hidden = rough_table(toy.space, 3)
    _, table = asked(Probes(1.0, 32), toy, toy.start, additive(hidden, toy.space))
    for row, true, r in zip(table, hidden, toy.space.rungs(toy.start), strict=True):
        assert row == pytest.approx([t - true[r] for t in true])


def test_two_probes_per_site_weigh_the_error_curve_which_is_exact_where_the_loss_is_proportional(toy):
    weights = [1.0 + i for i in range(len(toy.space.sites))]
    hidden = tuple(tuple(w * e for e in row) for w, row in zip(weights, toy.errors, strict=True))
    queries, table = asked(Probes(), toy, toy.start, additive(hidden, toy.space))
    assert len(queries) == 1 + 2 * len(weights)
    for row, true, r in zip(table, hidden, toy.space.rungs(toy.start), strict=True):
        assert row == pytest.approx([t - true[r] for t in true], abs=1e-4)


def test_probes_change_one_site_each_and_by_at_least_a_rung(toy):
    for reach in (1e-3, 0.25):
        queries, _ = asked(Probes(reach), toy, toy.start, additive(toy.errors, toy.space))
        changes = [
            [(i, k) for i, (k, c) in enumerate(zip(q.allocation, toy.start, strict=True)) if k != c] for q in queries
        ]
        assert [len(c) for c in changes] == [0] + [1] * (2 * len(toy.start))
        assert sorted(i for ((i, _),) in changes[1:]) == sorted([*range(len(toy.start))] * 2)
        assert all(q.probe and toy.space.is_probe(q.allocation) for q in queries)


def test_a_centre_may_be_dense_sub_layers_the_ladders_lack(toy):
    few = replace(toy, space=toy.space.zoomed(toy.start, stride=1 / 16, reach=2))
    few = replace(few, errors=convex_table(few.space))
    dense = tuple(site.n_groups for site in few.space.sites)
    queries, table = asked(Probes(1.0), few, dense, additive(few.errors, few.space))
    assert queries[0].allocation == dense
    assert any(ladder[-1] < site.n_groups for ladder, site in zip(few.space.ladders, few.space.sites, strict=True))
    for row, ladder, site, errors in zip(table, few.space.ladders, few.space.sites, few.errors, strict=True):
        assert len(row) == len(ladder)
        assert list(row) == sorted(row, reverse=True)
        assert row[0] == pytest.approx(errors[0])
        if ladder[-1] < site.n_groups:
            assert row[-1] > 0


def test_keeping_more_never_looks_worse():
    toy = ZOO["uneven"]()
    _, table = asked(Probes(), toy, toy.start, lambda a: float(sum(a)))
    assert all(max(row) - min(row) < 1e-9 for row in table)


def test_what_failed_looks_huge_and_a_failed_centre_teaches_nothing():
    toy = ZOO["uneven"]()
    _, table = asked(Probes(), toy, toy.start, lambda a: math.inf if a[1] < toy.start[1] else float(-a[3]))
    known = max(map(abs, table[3]))
    assert 0 < known < table[1][0]
    _, nothing = asked(Probes(), toy, toy.start, lambda a: math.inf if a == toy.start else 0.0)
    assert {t for row in nothing for t in row} == {0.0}


@pytest.mark.parametrize("wrong", [{"reach": 0.0}, {"points": 0}, {"tokens": 0}])
def test_refuses_nonsense(wrong):
    with pytest.raises(ValueError, match="reach"):
        Probes(**wrong)
