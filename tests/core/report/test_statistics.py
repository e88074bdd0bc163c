"""Intervals hold what they promise, corrections are those of the textbooks, and noise makes no winner."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.report.statistics import Standing, difference, holm, ranks, standings


def losses(seeds: int, windows: int, *, mean: float = 3.0, seed: int = 0) -> np.ndarray:
    return mean + np.random.default_rng(seed).normal(size=(seeds, windows))


def test_a_shift_of_all_windows_is_known_exactly_however_much_they_differ():
    a = losses(1, 40)
    found = difference(a + 0.1, a)
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert found.p < 0.001


def test_what_is_equal_is_no_difference():
    a = losses(2, 40)
    found = difference(a, a[::-1])
    assert found.p == 1
    assert found.low <= 0 <= found.high


@pytest.mark.slow
def test_intervals_hold_the_true_difference_as_often_as_they_say():
    rng, hits, times = np.random.default_rng(1), 0, 200
    for trial in range(times):
        common = rng.normal(size=(1, 60))  # windows differ far more than methods do
        a, b = (3 + common + 0.1 * rng.normal(size=(1, 60)) for _ in "ab")
        found = difference(a + 0.02, b, seed=trial)
        hits += found.low <= 0.02 <= found.high
    assert 0.9 <= hits / times <= 0.985


def test_seeds_that_differ_widen_the_interval():
    windows = losses(1, 50)
    steady, shaky = np.repeat(windows, 3, 0), windows + np.array([[-0.1], [0.0], [0.1]])
    other = windows + 0.05
    narrow, wide = difference(steady, other), difference(shaky, other)
    assert narrow.mean == pytest.approx(wide.mean)
    assert narrow.p < 0.05 < wide.p
    assert wide.low < narrow.low <= narrow.high < wide.high


def test_an_infinite_loss_has_no_interval_and_is_last():
    a = losses(1, 10)
    broken = a.copy()
    broken[0, 3] = math.inf
    assert math.isnan(difference(broken, a).low)
    found = standings({"broken": broken, "good": a})
    assert [each.name for each in found] == ["good", "broken"]
    assert not found[1].tied


def test_windows_that_are_not_the_same_are_refused():
    with pytest.raises(ValueError, match="5 and 6 windows"):
        difference(losses(1, 5), losses(1, 6))


def test_holm_is_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    kept = holm([math.nan, 0.01])
    assert math.isnan(kept[0])
    assert kept[1] == 0.01


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_only_raises_and_keeps_the_order(values):
    found = holm(values)
    assert all(0 <= p <= c <= 1 for p, c in zip(values, found, strict=True))
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [found[i] for i in order] == sorted(found)


def test_noise_makes_no_winner_and_a_gap_does():
    rng, base = np.random.default_rng(3), losses(1, 60)
    table = {
        "best": base + 0.02 * rng.normal(size=(2, 60)),
        "twin": base + 0.02 * rng.normal(size=(2, 60)),
        "worse": base + 0.2 + 0.02 * rng.normal(size=(2, 60)),
    }
    found = {each.name: each for each in standings(table, "worse")}
    assert found["best"].tied
    assert found["twin"].tied
    assert not found["worse"].tied
    assert found["worse"].above_reference == difference(table["worse"], table["worse"])
    assert found["best"].above_reference is not None
    assert found["best"].above_reference.high < 0
    assert isinstance(found["best"], Standing)


@pytest.mark.slow
def test_a_gap_is_no_tie_among_hundreds():
    rng = np.random.default_rng(0)
    text = rng.normal(3.8, 0.3, 32)
    losses = {f"worse {i}": (text + 0.2 + rng.normal(0, 0.02, 32))[None] for i in range(600)}
    losses |= {"best": text[None], "as good": (text + rng.normal(0, 0.02, 32))[None]}
    found = standings(losses)
    assert {each.name for each in found if each.tied} == {"best", "as good"}


def test_one_window_decides_nothing():
    assert difference(np.array([[4.0]]), np.array([[3.0]])).p == 1.0


def test_counted_and_computed_chances_meet():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 64)
    noise -= noise.mean()
    shifts = np.linspace(0.02, 0.06, 41)
    chances = [difference((noise + shift)[None], np.zeros((1, 64))).p for shift in shifts]
    steps = [later / earlier for earlier, later in pairwise(chances)]
    assert all(0.3 < step < 1.3 for step in steps)  # no jump where counting ends


def test_ranks_and_their_critical_difference_are_those_of_demsar():
    rng = np.random.default_rng(0)
    blocks = [{name: float(rng.normal() + i) for i, name in enumerate("abcd")} for _ in range(14)]
    found = ranks(blocks)
    assert found is not None
    assert found.critical == pytest.approx(1.25, abs=0.005)  # the example of his section 3.2.2: 2.569 sqrt(4·5 / 6·14)
    assert sum(found.mean.values()) == pytest.approx(10)
    assert found.blocks == 14
    assert found.p < 0.01


def test_ties_share_their_rank_and_few_blocks_have_none():
    even = [{"a": 1.0, "b": 1.0, "c": 1.0}] * 3
    found = ranks(even)
    assert found is not None
    assert set(found.mean.values()) == {2.0}
    assert found.p == 1
    assert ranks(even[:1]) is None
    assert ranks([{"a": 1.0, "b": 2.0}] * 5) is None
    assert ranks([{"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1.0, "b": 2.0}]) is None  # c is not in all
