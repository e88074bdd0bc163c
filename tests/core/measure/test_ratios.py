"""What is said of measurements, with noise that is made up."""

import random
import statistics

import pytest

from prunekit.measure.ratios import Ratio, Spread


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


def test_of_several_a_difference_is_clear_where_it_is_in_each_of_them() -> None:
    fast, faster, doubt = Ratio(1.2, 1.1, 1.3), Ratio(1.5, 1.4, 1.6), Ratio(1.1, 0.9, 1.2)
    assert Ratio.together([fast]) == fast
    both = Ratio.together([fast, faster])
    assert (both.median, both.low, both.high) == pytest.approx((1.35, 1.1, 1.6))
    assert not Ratio.together([fast, faster, doubt]).clear
    assert not Ratio.together([fast, Ratio(0.8, 0.7, 0.9)]).clear  # clear in both, and not the same way
