"""Times become prices: exactly, rising, and without counts that a larger one beats."""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit.errors import WrongInput
from prunekit.space.prices import Curve, Prices, Workload, curve, places, quanta, quantum, timed_counts, together
from prunekit.testing.spaces import sites_of, timed

GROUPS = st.one_of(st.integers(1, 40), st.sampled_from([352, 768, 1000, 11008, 14336]))


def stairs(n: int, tile: int, rise: int = 100, base: int = 5_000) -> dict[int, int]:
    """What hardware takes that works in tiles of groups: the same time anywhere within one."""
    return {k: base + rise * tile * -(-k // tile) for k in timed_counts(n)}


@given(GROUPS)
def test_few_counts_are_timed_and_all_that_is_asked_of_them_is_there(n: int) -> None:
    counts = timed_counts(n)
    assert len(counts) <= 45
    assert {0, n} <= set(counts) <= set(range(n + 1))
    assert set(quanta(n)) <= set(counts)
    for place in places(n):
        assert all(place - step in counts for step in [0, *quanta(n)[1:]])


@given(GROUPS, st.integers(1, 100), st.integers(1, 40))
def test_a_straight_line_has_the_price_of_every_multiple_of_the_finest_quantum(n: int, rise: int, sites: int) -> None:
    times = {k: 7 + sites * rise * k for k in timed_counts(n)}
    found = curve(times, n, sites)
    step = quanta(n)[-1]
    assert found.counts == (*range(0, n, step), n)
    assert all(found.price(k) == rise * k for k in found.counts)


@given(GROUPS, st.data())
def test_prices_rise_strictly_and_never_lie_above_a_larger_counts_time(n: int, data: st.DataObject) -> None:
    times = {k: data.draw(st.integers(0, 10_000)) for k in timed_counts(n)}
    sites = data.draw(st.integers(1, 4))
    found = curve(times, n, sites)
    assert found.counts[-1] == n
    assert all(a < b for row in (found.counts, found.prices) for a, b in pairwise(row))
    step = quantum(times, n)
    for kept in [k for k in times if k % step == 0 or k == n]:
        cheapest = min(times[k] for k in times if k >= kept and (k % step == 0 or k == n))
        assert found.price(kept) <= max(0, (cheapest - times[0]) // sites)


def test_tiles_of_the_hardware_are_the_counts_worth_keeping() -> None:
    times = stairs(768, tile=32)
    assert quantum(times, 768) == 32
    found = curve(times, 768, sites=1)
    assert found.counts == (0, *range(32, 769, 32))
    assert found.prices == (0, *range(3200, 76_801, 3200))
    assert quantum(stairs(768, tile=8), 768) == 8


@pytest.mark.parametrize(
    ("shares", "found"),
    [
        ({32: "11/20"}, 32),
        ({32: "1/2"}, 32),  # half is enough
        ({32: "9/20"}, 64),
        ({32: "11/20", 16: "9/20"}, 32),
        ({32: "1", 16: "11/20", 8: "3/10", 4: "3/10"}, 16),
        ({32: "3/10", 16: "1", 8: "1", 4: "1"}, 64),  # what comes after a padded step does not count
        ({32: "3/4", 16: "3/4", 8: "3/4", 4: "3/4"}, 4),
        ({32: "-1"}, 64),
    ],
)
def test_the_quantum_is_halved_while_half_of_the_slopes_promise_is_saved(shares: dict[int, str], found: int) -> None:
    slope, n = 2_000, 768  # nanoseconds per group
    times = {k: slope * k for k in timed_counts(n)}
    for place in places(n):
        for step in quanta(n)[1:]:
            times[place - step] = times[place] - int(slope * step * Fraction(shares.get(step, "0")))
    assert quanta(n) == [64, 32, 16, 8, 4]
    assert quantum(times, n) == found


def test_a_count_that_a_larger_one_beats_is_raised_to_it() -> None:
    times = {0: 0, 1: 50, 2: 60, 3: 95, 4: 90, 5: 100, 6: 100, 7: 110, 8: 130}  # 3 and 5 are badly aligned
    found = curve(times, 8, sites=1)
    assert found.counts == (0, 1, 2, 4, 6, 7, 8)
    assert found.price(3) == found.price(4) == 90
    assert found.price(5) == 100


def test_nothing_is_interpolated_across_a_count_that_was_slower() -> None:
    times = {k: 100 * k for k in timed_counts(768)}
    times[320] = times[352] + 1  # slower than the next of the grid
    found = curve(times, 768, sites=1)
    assert not any(256 < k < 352 for k in found.counts)
    assert {252, 256, 352, 356} <= set(found.counts)


def test_hardware_that_gains_nothing_from_narrower_layers_leaves_the_choice_to_drop_them() -> None:
    flat = {k: 900 if k else 100 for k in timed_counts(768)}
    assert curve(flat, 768, sites=4) == Curve((0, 768), (0, 200), 4)


def test_what_is_saved_together_scales_what_is_saved_alone() -> None:
    assert together(100, [[80, 90], [60, 70]], [79, 51]) == Fraction(21 + 49, 30 + 70)
    assert together(100, [[100, 101]], [90]) == 1  # nothing to scale
    times = {0: 20, 1: 50, 2: 80}
    assert curve(times, 2, sites=2, scale=Fraction(7, 10)).prices == (0, 10, 21)


def test_sub_layers_and_the_rest_are_the_dense_model_to_the_nanosecond() -> None:
    table = timed(sites_of(3, attention=(4, 10), mlp=(16, 3)))
    assert table.outside + sum(c.sites * c.price(c.counts[-1]) for c in table.curves.values()) == table.dense


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = timed(sites_of(3, attention=(4, 10), mlp=(16, 3)))
    (tmp_path / "prices.json").write_text(json.dumps(table.as_dict()))
    assert Prices.load(tmp_path) == Prices.load(tmp_path / "prices.json") == Prices.of(table.as_dict()) == table


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"curves": {"a": {"counts": [0, 2, 1], "prices": [0, 1, 2], "sites": 1}}}, "ascend strictly"),
        ({"curves": {"a": {"counts": [0, 2], "prices": [3, 3], "sites": 1}}}, "ascend strictly"),
        ({"curves": {"a": {"counts": [2], "prices": [-3], "sites": 1}}}, "from 0 up"),
        ({"curves": {"a": {"counts": [2], "prices": [300], "sites": 9}}}, "take longer than its model"),
        ({"workload": {"batch": 1}}, "no price table"),
        ({"curves": []}, "no price table"),
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, object], says: str) -> None:
    table = timed(sites_of(1, attention=(4, 10), mlp=(16, 3)))
    with pytest.raises(WrongInput, match=says):
        Prices.of(table.as_dict() | change)


def test_a_file_that_is_not_there_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"there is no price table .*--set latency\.prices=null"):
        Prices.load(tmp_path / "prices.json")
    (tmp_path / "prices.json").write_text("{")
    with pytest.raises(WrongInput, match="not JSON"):
        Prices.load(tmp_path)


def test_a_workload_says_what_is_timed() -> None:
    assert str(Workload(2, 256, 0)) == "2 × 256 tokens read"
    assert str(Workload(1, 64, 32)) == "1 × 64 tokens read, 32 made"
