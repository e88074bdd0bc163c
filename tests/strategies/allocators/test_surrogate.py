import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import Allocation, Query
from prunekit.testing.spaces import ZOO, additive, problem, rough_table, small_llama
from prunekit_strategies.allocators.probes import Table, total
from prunekit_strategies.allocators.surrogate import HALF, Judged, Screen, Surrogate, recorded

WEAK = (1e12,)


@pytest.fixture(scope="module")
def toy():
    whole = small_llama()
    return problem(whole.zoomed(whole.uniform(), stride=1 / 16, reach=16))


def drawn(space, count: int, seed: int = 0) -> list[Allocation]:
    """Allocations of any price."""
    rng = random.Random(seed)
    return [tuple(rng.choice(ladder) for ladder in space.ladders) for _ in range(count)]


def bent(problem_, seed: int = 0) -> Table:
    """The table times three, and at every site a slope and a curvature."""
    rng = random.Random(seed)
    rows = []
    for row, ladder, site in zip(problem_.errors, problem_.space.ladders, problem_.space.sites, strict=True):
        u, v = rng.gauss(0, 1), rng.gauss(0, 1)
        x = [1 - k / site.n_groups for k in ladder]
        rows.append(tuple(3 * e + u * z + v * z * z for e, z in zip(row, x, strict=True)))
    return tuple(rows)


def differences(problem_, table: Table, allocations: list[Allocation]) -> list[float]:
    sums = [total(problem_.space, table, a) for a in allocations]
    return [x - sums[0] for x in sums]


def test_without_judgements_it_is_the_table(toy) -> None:
    surrogate = Surrogate(toy.space, toy.errors)
    assert surrogate.fitted({}) == toy.errors
    assert surrogate.fitted({(toy.start, 512): 3.0, (toy.start, 4_096): 1.0}) == toy.errors  # nothing to compare


def test_recovers_what_its_terms_can_say_and_foretells_what_it_has_not_seen(toy) -> None:
    hidden = bent(toy)
    judged: Judged = {(a, 512): total(toy.space, hidden, a) for a in drawn(toy.space, 60)}
    fitted = Surrogate(toy.space, toy.errors, WEAK).fitted(judged)
    strangers = drawn(toy.space, 20, seed=1)
    assert differences(toy, fitted, strangers) == pytest.approx(differences(toy, hidden, strangers), abs=1e-6)


def test_a_table_that_is_right_but_for_its_unit_stays_right(toy) -> None:
    hidden = tuple(tuple(0.02 * e for e in row) for row in toy.errors)
    judged: Judged = {(a, 512): total(toy.space, hidden, a) for a in drawn(toy.space, 3)}
    fitted = Surrogate(toy.space, toy.errors).fitted(judged)
    strangers = drawn(toy.space, 20, seed=1)
    assert differences(toy, fitted, strangers) == pytest.approx(differences(toy, hidden, strangers), rel=1e-6)


def test_is_the_closed_form_of_a_dense_ridge_regression_with_free_levels() -> None:
    toy = ZOO["uneven"]()
    rng, trust = random.Random(3), 0.7
    judged: Judged = {(a, rng.choice([512, 4_096])): rng.gauss(5, 1) for a in drawn(toy.space, 15)}
    fitted = Surrogate(toy.space, toy.errors, (trust,)).fitted(judged)

    tables = [np.array(row) for row in toy.errors]
    mean = np.mean([np.ptp(row) for row in tables])
    x = [1 - np.array(ladder) / s.n_groups for ladder, s in zip(toy.space.ladders, toy.space.sites, strict=True)]

    def features(a: Allocation) -> list[float]:
        at = toy.space.rungs(a)
        return [
            sum(float(row[r]) for row, r in zip(tables, at, strict=True)) / float(mean),
            *(float(z[r]) for z, r in zip(x, at, strict=True)),
            *(float(z[r]) ** 2 for z, r in zip(x, at, strict=True)),
        ]

    phi, y = np.array([features(a) for a, _ in judged]), np.array(list(judged.values()))
    levels = np.array([[float(t == one) for one in (512, 4_096)] for _, t in judged])
    noise = np.diag([1 + HALF / t for _, t in judged if t])
    # the length of the losses over that of the table, without their levels
    project = np.eye(len(y)) - levels @ np.linalg.pinv(levels)
    scaled = np.sqrt(np.linalg.inv(noise)) @ project
    s = np.linalg.norm(scaled @ y) / np.linalg.norm(scaled @ phi[:, 0])
    # generalised least squares for the levels under the covariance of all the rest, then the posterior mean
    inverse = np.linalg.inv(trust * phi @ phi.T + noise)
    rest = y - s * phi[:, 0]
    c = np.linalg.solve(levels.T @ inverse @ levels, levels.T @ inverse @ rest)
    w = trust * phi.T @ inverse @ (rest - levels @ c)

    strangers = drawn(toy.space, 10, seed=1)
    wanted = [float(np.dot(features(a), w) + s * features(a)[0]) for a in strangers]
    assert differences(toy, fitted, strangers) == pytest.approx([f - wanted[0] for f in wanted], abs=1e-8)


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.floats(1e-200, 1e200))
def test_neither_order_nor_unit_nor_level_of_the_losses_matters(seed: int, unit: float) -> None:
    toy, rng = ZOO["uneven"](), random.Random(seed)
    judged = [((a, rng.choice([512, 4_096])), rng.gauss(0, 1)) for a in dict.fromkeys(drawn(toy.space, 12))]
    moved = [((a, t), unit * (loss + (t == 512))) for (a, t), loss in judged]
    rng.shuffle(moved)
    surrogate = Surrogate(toy.space, toy.errors, (1.0,))
    before, after = surrogate.fitted(dict(judged)), surrogate.fitted(dict(moved))
    rows = drawn(toy.space, 5, seed=1)
    assert [x / unit for x in differences(toy, after, rows)] == pytest.approx(differences(toy, before, rows), rel=1e-6)


def test_what_failed_and_what_the_ladders_lack_is_left_out(toy) -> None:
    some: Judged = {(a, 512): total(toy.space, toy.errors, a) ** 2 for a in drawn(toy.space, 10)}
    failed = {(a, 512): math.inf for a in drawn(toy.space, 3, seed=1)}
    missing = {(tuple(k + 1 for k in toy.start), 512): 7.0}
    surrogate = Surrogate(toy.space, toy.errors)
    assert surrogate.fitted(some | failed | missing) == surrogate.fitted(some)


def test_more_trust_is_taken_where_a_table_is_wrong(toy) -> None:
    allocations = drawn(toy.space, 60)
    surrogate, tight = Surrogate(toy.space, toy.errors), Surrogate(toy.space, toy.errors, (1e-2,))
    wrong, strangers = bent(toy), drawn(toy.space, 20, seed=1)
    judged: Judged = {(a, 512): total(toy.space, wrong, a) for a in allocations}
    truth = np.array(differences(toy, wrong, strangers))
    free, bound = (np.array(differences(toy, s.fitted(judged), strangers)) for s in (surrogate, tight))
    assert np.abs(free - truth).max() < 0.1 * np.abs(bound - truth).max()


def generation(screen: Screen, toy, judged: Judged, loss, seed: int) -> list[Allocation]:
    """One round of choosing and judging."""
    pool = screen.chosen(drawn_tight(toy, 32, seed), 8, set(), judged)
    judged |= {(a, 512): loss(a) for a in pool}
    return pool


def drawn_tight(toy, count: int, seed: int) -> list[Allocation]:
    rng = random.Random(seed)
    wishes = ([rng.random() * s.n_groups for s in toy.space.sites] for _ in range(count))
    return list(dict.fromkeys(toy.space.nearest(w) for w in wishes))


def test_a_screen_sends_its_own_idea_the_best_it_was_shown_and_some_as_they_come(toy) -> None:
    surrogate, children, idea = Surrogate(toy.space, toy.errors), drawn_tight(toy, 32, 0), toy.space.lowest(toy.errors)
    pool = Screen(surrogate).chosen(children, 8, set(), {})
    loss = additive(toy.errors, toy.space)
    assert pool[:6] == sorted([idea, *children], key=lambda a: (loss(a), a))[:6]
    assert pool[6:] == [a for a in children if a not in pool[:6]][:2]
    assert idea not in Screen(surrogate).chosen(children, 8, {idea}, {})


def test_a_screen_steps_aside_where_it_foretells_the_wrong_order_and_comes_back_when_it_has_learnt(toy) -> None:
    right = additive(toy.errors, toy.space)
    screen, judged = Screen(Surrogate(toy.space, toy.errors, (1e-9,))), Judged()  # it does not learn
    for seed in range(3):
        generation(screen, toy, judged, lambda a: -right(a), seed)
    assert screen.chosen(children := drawn_tight(toy, 32, 9), 8, set(), judged) == children[:8]
    for seed in range(4, 9):
        generation(screen, toy, judged, right, seed)
    assert screen.chosen(children, 8, set(), judged) != children[:8]


def test_losses_are_on_record_before_the_search_is_told() -> None:
    judged: Judged = {}
    toy = ZOO["even"]()

    def search():
        losses = yield [Query(toy.start, 512)]
        assert judged == {(toy.start, 512): losses[0]}
        return toy.start

    talk = recorded(search(), judged)
    next(talk)
    with pytest.raises(StopIteration) as stop:
        talk.send([4.0])
    assert stop.value.value == toy.start


def test_a_rough_table_is_no_obstacle(toy) -> None:
    hidden = rough_table(toy.space, 5)
    judged: Judged = {(a, 512): total(toy.space, hidden, a) for a in drawn(toy.space, 40)}
    assert toy.space.is_feasible(toy.space.lowest(Surrogate(toy.space, toy.errors).fitted(judged)))
