import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.testing import best_allocation, converse
from prunekit.testing.allocators import furnished
from prunekit.testing.spaces import additive, problem, small_llama
from prunekit_strategies.allocators.softmax import ClosedForm, dilute, fermi, level, separable, slopes, standard

ENERGIES, PRICES = [-1.2, 0.3, 0.9, -0.4], [7, 100, 31, 64]
closed = partial(ClosedForm, table="errors")  # the curves that toys have
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


def test_fermi_counts_the_ways_to_choose_units_and_the_softmax_those_to_choose_them_again() -> None:
    """Σ K_l e_l - T log(ways), enumerated over all ways to take 40 of 30, 20 and 50 units."""
    energies, units, taken, heat = (0.2, 0.9, 1.7), (30, 20, 50), 40, 0.5

    def lgamma(*terms: float) -> float:
        return math.fsum(math.lgamma(t + 1) for t in terms)

    def once(counts: tuple[int, ...]) -> float:
        return math.fsum(math.log(math.comb(n, k)) for n, k in zip(units, counts, strict=True))

    def again(counts: tuple[int, ...]) -> float:
        chosen = math.fsum(k * math.log(n) for n, k in zip(units, counts, strict=True))
        return lgamma(taken) - lgamma(*counts) + chosen

    def least(ways: Callable[[tuple[int, ...]], float], most: tuple[int, ...]) -> tuple[int, ...]:
        every = [(a, b, taken - a - b) for a in range(most[0] + 1) for b in range(min(most[1], taken - a) + 1)]
        able = [counts for counts in every if counts[2] <= most[2]]
        return min(able, key=lambda c: math.fsum(k * e for k, e in zip(c, energies, strict=True)) - heat * ways(c))

    def law(occupied: Callable[[float], float]) -> list[float]:
        shares = level([e / heat for e in energies], units, sum(units) - taken, occupied)
        return [n * s for n, s in zip(units, shares, strict=True)]

    assert least(once, units) == (24, 9, 7)
    assert law(fermi) == pytest.approx([23.3, 9.3, 7.4], abs=0.05)
    assert least(again, (taken,) * 3) == (33, 5, 2)  # more than the 30 there are
    assert law(math.exp) == pytest.approx([32.1, 5.3, 2.7], abs=0.05)
    assert law(dilute)[0] == 30


def test_z_scores_weigh_by_price_and_equal_energies_are_zero() -> None:
    z = standard(ENERGIES, PRICES)
    assert math.fsum(p * x for p, x in zip(PRICES, z, strict=True)) == pytest.approx(0, abs=1e-12)
    assert math.fsum(p * x * x for p, x in zip(PRICES, z, strict=True)) == pytest.approx(sum(PRICES))
    assert standard([0.1, 0.1, 0.1], [1, 2, 3]) == [0, 0, 0]


@pytest.mark.parametrize("rule", ["fermi", "softmax", "threshold", "water-filling"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_closes_much_of_the_gap_between_uniform_and_the_optimum(rule: str, share: float, seed: int) -> None:
    toy = problem(closed().first_space(small_llama(share)), seed=seed)
    loss = additive(toy.errors, toy.space)
    talk = converse(closed(rule), toy)  # type: ignore[arg-type]
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
    found = converse(closed("threshold"), toy).answer
    assert loss(found) == pytest.approx(best_allocation(toy.space, toy.errors)[1])


@pytest.mark.parametrize("rule", ["compliance", "water-filling"])
def test_quadratic_energies_are_at_their_least(rule: str) -> None:
    toy = furnished(problem(small_llama(0.4)), closed(rule))  # type: ignore[arg-type]
    sites = toy.space.sites
    price = [s.parameters(s.n_groups) for s in sites]
    steep = [p * q for p, q in zip(price, slopes(toy, range(16)), strict=True)]
    energy = toy.signals[0] if rule == "compliance" else steep
    wish = closed(rule, most=0.9).wish(toy)  # type: ignore[arg-type]
    shares = [1 - k / s.n_groups for k, s in zip(wish, sites, strict=True)]
    assert math.fsum(p * (1 - s) for p, s in zip(price, shares, strict=True)) == pytest.approx(toy.space.budget.limit)
    assert max(shares) <= 0.9
    marginal = [a * s / p for a, s, p in zip(energy, shares, price, strict=True) if s < 0.9 - 1e-9]
    assert max(marginal) == pytest.approx(min(marginal))  # d(A s²) per price is one multiplier
    total, rng = math.fsum(a * s * s for a, s in zip(energy, shares, strict=True)), random.Random(0)
    judged = 0
    for _ in range(200):
        i, j = rng.sample(range(16), 2)
        moved, step = list(shares), rng.uniform(-0.05, 0.05) * price[0]
        moved[i], moved[j] = moved[i] + step / price[i], moved[j] - step / price[j]
        if min(moved) >= 0 and max(moved) <= 0.9:
            judged += 1
            assert math.fsum(a * s * s for a, s in zip(energy, moved, strict=True)) >= total
    assert judged > 20


def test_with_one_price_sites_lose_groups_in_proportion_to_their_compliance() -> None:
    sites = small_llama().sites[1::2]
    whole = Space.whole(sites, Budget.keeping(0.7, sites))
    toy = furnished(problem(whole), closed("compliance"))
    compliance = [768**2 / a for a in toy.signals[0]]
    removed = [768 - kept for kept in closed("compliance").wish(toy)]
    free = [r / c for r, c in zip(removed, compliance, strict=True) if r < 768 - 1e-6]
    assert max(free) == pytest.approx(min(free))


def test_unit_scores_draw_the_curve_of_what_goes_first() -> None:
    sites = (Site("a", 0, "mlp", 4, 1, 1), Site("b", 1, "mlp", 2, 1, 1))
    space = Space(sites, ((0, 1, 3, 4), (0, 1, 2)), Budget(3))
    toy = replace(problem(space), scores=((4.0, 1.0, 3.0, 2.0), (0.0, 0.0)))
    assert separable(toy).errors[0] == pytest.approx((1.0, 0.6, 0.1, 0.0))
    assert separable(toy).errors[1] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_threshold_over_unit_scores_is_one_quantile(seed: int) -> None:
    rng = random.Random(seed)
    sites = tuple(Site(str(i), i, "mlp", 6, 1, 5) for i in range(4))
    space = Space.whole(sites, Budget(5 * 13))
    scores = [[rng.expovariate(1) for _ in range(6)] for _ in sites]
    scores = tuple(tuple(x / sum(s) for x in s) for s in scores)  # of equal sums, so that they stay as they are
    toy = replace(problem(space), scores=scores)
    tau = sorted(x for s in scores for x in s)[24 - 13]
    expected = [sum(x >= tau for x in s) for s in scores]
    assert closed("threshold", energy="scores").wish(toy) == pytest.approx(expected)


def test_no_share_is_above_the_cap() -> None:
    toy = problem(small_llama(0.3))
    for rule in ("fermi", "softmax", "threshold", "water-filling"):
        wish = closed(rule, most=0.8).wish(toy, 0.25)
        assert min(k / s.n_groups for k, s in zip(wish, toy.space.sites, strict=True)) >= 0.2 - 1e-9


def test_sites_that_lose_the_same_keep_the_same() -> None:
    toy = problem(closed().first_space(small_llama()), errors=None)
    equal = problem(
        toy.space,
        tuple(
            tuple((1 - k / s.n_groups) ** 2 for k in ladder)
            for s, ladder in zip(toy.space.sites, toy.space.ladders, strict=True)
        ),
    )
    for rule in ("fermi", "softmax"):
        wish = closed(rule).wish(equal)
        assert len({round(k / s.n_groups, 9) for k, s in zip(wish[1::2], toy.space.sites[1::2], strict=True)}) == 1
