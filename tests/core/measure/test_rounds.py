"""Rounds and what is said of them, with noise that is made up."""

import random
import statistics

import pytest
import torch

from prunekit.measure import rounds
from prunekit.measure.rounds import Ratio, Spread, elapsed, interleaved, one_thread, own_time
from prunekit.system.progress import Progress

CPU = torch.device("cpu")


def test_every_round_has_every_turn_in_an_order_of_its_own() -> None:
    seen: list[str] = []
    turns = {key: lambda key=key: seen.append(key) or len(seen) for key in "ab"}
    found = interleaved(turns, Progress(), "x", rounds=12, fewest=1, seconds=60, more_of_first=1)
    each = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(each) == 12
    assert all(sorted(order) == ["a", "a", "b"] for order in each)
    assert len(set(each)) > 1
    assert found == {key: [i + 1 for i, other in enumerate(seen) if other == key] for key in "ab"}


@pytest.mark.parametrize(("fewest", "seconds", "expected"), [(2, 2.0, 4), (6, 0.5, 6), (2, 99.0, 9)])
def test_no_further_round_begins_when_time_is_up(
    fewest: int, seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(100))  # a second later whenever it is asked
    monkeypatch.setattr(rounds.time, "monotonic", lambda: float(next(now)))
    found = interleaved({"a": lambda: 1}, Progress(), "x", rounds=9, fewest=fewest, seconds=seconds)
    assert len(found["a"]) == expected


def test_a_spread_is_the_median_and_the_middle_half() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert str(Spread(2500.0, 2400.0, 2600.0)) == "2,500 ±4.0%"
    assert str(Spread(25.04, 24.0, 25.0)) == "25.0 ±2.0%"


def test_a_machine_that_slows_down_does_not_hide_a_difference() -> None:
    dense = [100.0 / (1 + i) for i in range(15)]  # ever slower
    pruned = [1.1 * rate for rate in dense]
    ratio = Ratio.of(pruned, dense)
    assert ratio.clear
    assert str(ratio) == "1.10 (1.10-1.10)"


@pytest.mark.parametrize(("n", "k"), [(6, 1), (8, 1), (9, 2), (15, 4), (30, 10)])
def test_the_interval_is_that_of_the_sign_test(n: int, k: int) -> None:
    """The ranks of tables of the sign test at 5 %."""
    values = [float(i) for i in range(1, n + 1)]
    random.Random(0).shuffle(values)
    assert Ratio.of(values, [1.0] * n) == Ratio((n + 1) / 2, float(k), float(n + 1 - k))


def test_the_interval_misses_the_true_ratio_in_one_of_twenty() -> None:
    rng = random.Random(0)
    missed = [
        not (found := Ratio.of([rng.lognormvariate(0, 0.3) for _ in range(15)], [1.0] * 15)).low <= 1 <= found.high
        for _ in range(2000)
    ]
    assert 0.025 < statistics.mean(missed) < 0.045  # exactly 0.0352: ranks are whole


def test_noise_that_hides_a_difference_is_said_to() -> None:
    ratio = Ratio.of([0.7, 1.3] * 4, [1.0] * 8)
    assert not ratio.clear
    assert str(ratio) == "no difference beyond noise"
    assert str(Ratio.of([0.5] * 6, [1.0] * 6)) == "0.50 (0.50-0.50)"  # a clear loss is said as well


def test_a_few_pairs_make_no_interval() -> None:
    with pytest.raises(ValueError, match="an interval takes 6 pairs, not 5"):
        Ratio.of([2.0] * 5, [1.0] * 5)
    with pytest.raises(ValueError, match="shorter"):
        Ratio.of([2.0] * 7, [1.0] * 6)


def test_one_thread_has_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, step in (("thread_time_ns", 7), ("perf_counter_ns", 1000)):
        clock = iter(range(0, 10 * step, step))
        monkeypatch.setattr(rounds.time, name, lambda clock=clock: next(clock))
    threads, ran = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    try:
        assert elapsed(lambda: ran.append(torch.get_num_threads()), CPU) == 1000
        with one_thread():
            assert own_time(CPU)
            assert elapsed(lambda: ran.append(torch.get_num_threads()), CPU) == 7
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert ran == [2, 1]
    assert not own_time(torch.device("cuda"))
