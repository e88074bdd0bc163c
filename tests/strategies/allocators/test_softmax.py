import math
import random

import pytest

from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import additive, problem, small_llama
from prunekit_strategies.allocators.softmax import ClosedForm, dilute, fermi, level, standard

ENERGIES, PRICES = [-1.2, 0.3, 0.9, -0.4], [7, 100, 31, 64]
LAWS = pytest.mark.parametrize("law", [fermi, dilute], ids=["fermi", "softmax"])


def kept(shares: list[float]) -> float:
    return math.fsum(p * (1 - s) for p, s in zip(PRICES, shares, strict=True))


@LAWS
@pytest.mark.parametrize("limit", [1, 60, 101, 190, 202])
def test_the_budget_is_met_exactly_at_unequal_prices(law: object, limit: int) -> None:
    assert kept(level(ENERGIES, PRICES, limit, law)) == pytest.approx(limit, abs=1e-10)  # type: ignore[arg-type]


@LAWS
def test_shares_fall_with_energy_and_ignore_a_common_shift(law: object) -> None:
    shares = level(ENERGIES, PRICES, 101, law)  # type: ignore[arg-type]
    assert sorted(range(4), key=lambda i: -shares[i]) == sorted(range(4), key=lambda i: ENERGIES[i])
    assert level([e + 3 for e in ENERGIES], PRICES, 101, law) == pytest.approx(shares)  # type: ignore[arg-type]


@LAWS
def test_heat_makes_it_uniform(law: object) -> None:
    assert level([e / 1e9 for e in ENERGIES], PRICES, 101, law) == pytest.approx([0.5] * 4)  # type: ignore[arg-type]


def test_cold_empties_the_lowest_energies_first() -> None:
    assert level([e / 1e-3 for e in ENERGIES], PRICES, 101, fermi) == pytest.approx([1, 0.3, 0, 1], abs=1e-6)


def test_fermi_minimises_its_free_energy() -> None:
    def free_energy(shares: list[float]) -> float:
        entropy = [-s * math.log(s) - (1 - s) * math.log(1 - s) for s in shares]
        return math.fsum(p * (e * s - h) for p, e, s, h in zip(PRICES, ENERGIES, shares, entropy, strict=True))

    best, rng = level(ENERGIES, PRICES, 101, fermi), random.Random(0)
    for _ in range(200):
        i, j = rng.sample(range(4), 2)
        moved, step = list(best), rng.uniform(-0.05, 0.05)
        moved[i] += step / PRICES[i]
        moved[j] -= step / PRICES[j]
        assert free_energy(moved) >= free_energy(best)


def test_z_scores_weigh_by_price_and_equal_energies_are_zero() -> None:
    z = standard(ENERGIES, PRICES)
    assert math.fsum(p * x for p, x in zip(PRICES, z, strict=True)) == pytest.approx(0, abs=1e-12)
    assert math.fsum(p * x * x for p, x in zip(PRICES, z, strict=True)) == pytest.approx(sum(PRICES))
    assert standard([0.1, 0.1, 0.1], [1, 2, 3]) == [0, 0, 0]


@pytest.mark.parametrize("rule", ["fermi", "softmax", "threshold", "compliance"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_closes_much_of_the_gap_between_uniform_and_the_optimum(rule: str, share: float, seed: int) -> None:
    toy = problem(ClosedForm().first_space(small_llama(share)), seed=seed)
    loss = additive(toy.errors, toy.space)
    talk = converse(ClosedForm(rule), toy)  # type: ignore[arg-type]
    optimum = best_allocation(toy.space, toy.errors)[1]
    assert len(talk.asked) == 1
    assert loss(talk.answer) - optimum < 0.75 * (loss(toy.start) - optimum)
    if rule == "threshold":
        assert loss(talk.answer) <= 1.02 * optimum


def test_threshold_is_exact_where_one_price_fits_all() -> None:
    whole = small_llama()
    whole = type(whole).whole(whole.sites[1::2], whole.budget)  # MLP sites only
    toy = problem(whole.zoomed(whole.uniform(), stride=1 / 8, reach=8))
    loss = additive(toy.errors, toy.space)
    found = converse(ClosedForm("threshold"), toy).answer
    assert loss(found) == pytest.approx(best_allocation(toy.space, toy.errors)[1])


def test_sites_that_lose_the_same_keep_the_same() -> None:
    toy = problem(ClosedForm().first_space(small_llama()), errors=None)
    equal = problem(
        toy.space,
        tuple(
            tuple((1 - k / s.n_groups) ** 2 for k in ladder)
            for s, ladder in zip(toy.space.sites, toy.space.ladders, strict=True)
        ),
    )
    for rule in ("fermi", "softmax"):
        wish = ClosedForm(rule).wish(equal)
        assert len({round(k / s.n_groups, 9) for k, s in zip(wish[1::2], toy.space.sites[1::2], strict=True)}) == 1


def test_refuses_an_unknown_rule_and_absolute_zero() -> None:
    with pytest.raises(ValueError, match="no rule 'bose'"):
        ClosedForm("bose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 0"):
        ClosedForm(temperature=0.0)
