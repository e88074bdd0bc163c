import math
from dataclasses import replace

import pytest
import torch

from prunekit.testing import toy_layer
from prunekit_strategies.signals.tail_exponent import NO_TAIL, TailExponent, spectrum, tail_exponent


def pareto(n: int, alpha: float, least: float = 1.0) -> torch.Tensor:
    """Quantiles of a density that falls with x^-alpha above `least`, ascending."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return least * (1 - u) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_a_pareto_spectrum_gives_its_exponent_back(alpha):
    assert tail_exponent(pareto(4000, alpha)) == pytest.approx(alpha, rel=0.02)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e6])
def test_the_exponent_does_not_depend_on_the_unit(scale):
    bulk = torch.linspace(0.02, 1.0, 500, dtype=torch.float64)
    values = torch.cat([bulk, pareto(1500, 2.5)]).sort().values
    assert tail_exponent(scale * values) == pytest.approx(tail_exponent(values), rel=1e-9)


def test_the_bulk_below_the_tail_is_left_out():
    bulk = torch.linspace(0.001, 1.0, 1000, dtype=torch.float64)
    values = torch.cat([bulk, pareto(3000, 3.0)]).sort().values
    everything = 1 + len(values) / float((values / values[0]).log().sum())  # Hill from the smallest one on
    assert tail_exponent(values) == pytest.approx(3.0, rel=0.05)
    assert abs(everything - 3.0) > 1


def test_the_threshold_is_the_one_of_least_distance_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, generator=generator).double().exp().sort().values
    found = []
    for k in range(39):
        tail = values[k:] / values[k]
        alpha, m = 1 + len(tail) / float(tail.log().sum()), len(tail)
        steps = [abs(1 - float(x) ** (1 - alpha) - j / m) for i, x in enumerate(tail) for j in (i, i + 1)]
        found.append((max(steps), alpha))
    assert tail_exponent(values, bins=1) == pytest.approx(min(found)[1])  # one bin: every threshold is tried


def test_a_heavier_tail_has_a_smaller_exponent():
    found = [tail_exponent(pareto(500, alpha)) for alpha in (1.5, 2.0, 3.0, 5.0)]
    assert found == sorted(found)


def test_no_tail_is_lighter_than_none():
    assert tail_exponent(torch.ones(10, dtype=torch.float64)) == NO_TAIL
    assert tail_exponent(torch.zeros(0, dtype=torch.float64)) == NO_TAIL


def test_the_spectrum_is_that_of_the_singular_values_without_rounding():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    expected = torch.linalg.svdvals(weight.double()).square().flip(0)[-3:]
    for matrix in (weight, weight.T):
        torch.testing.assert_close(spectrum(matrix), expected, rtol=1e-5, atol=0)


def test_a_site_has_the_mean_over_its_maps():
    layer = toy_layer(40, 1, 40)
    alone = [TailExponent().measure(replace(layer, producers=()))]
    alone += [tail_exponent(spectrum(producer.weight)) for producer in layer.producers]
    assert TailExponent().measure(layer) == pytest.approx(math.fsum(alone) / 3)
