import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit.testing.layers import damped_loss
from prunekit_strategies.pruners.obs import removal
from prunekit_strategies.pruners.obs.removal import (
    COMPENSATED,
    masked_error,
    refitted,
    remove_columns,
    remove_groups,
    remove_masked,
)

SIZES = [pytest.param(1, id="columns"), pytest.param(3, id="blocks")]


def exact(n_groups: int, size: int = 1, seed: int = 0) -> LayerProblem:
    return toy_layer(n_groups, size, seed=seed, dtype=torch.float64, moments=torch.float64)


def price(name: str, size: int) -> removal.Price:
    return lambda w, v, left: COMPENSATED[name](w, v, size)


def one(left: int) -> int:
    return 1


# -- prices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES)
def test_the_exact_price_is_the_error_of_the_refit_without_the_group(size: int, seed: int) -> None:
    layer = exact(6, size, seed)
    prices = removal.exact(layer.weight, removal.inverse(layer.hessian), size)
    for g in range(6):
        without = layer.refitted([k for k in range(6) if k != g])
        assert float(prices[g]) == pytest.approx(damped_loss(layer, without.weight), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_grouped_cholesky_price_is_never_below_the_diagonal_one_and_neither_is_exact(seed: int) -> None:
    layer = exact(6, 3, seed)
    v = removal.inverse(layer.hessian)
    prices = {name: f(layer.weight, v, 3) for name, f in COMPENSATED.items()}
    assert bool((prices["grouped-cholesky"] >= prices["diagonal"] * (1 - 1e-12)).all())
    assert not torch.allclose(prices["grouped-cholesky"], prices["exact"], rtol=1e-2)
    assert not torch.allclose(prices["diagonal"], prices["exact"], rtol=1e-2)


def test_only_the_grouped_cholesky_price_depends_on_the_order_inside_a_group() -> None:
    layer = exact(4, 3)
    spread = {}
    for name, f in COMPENSATED.items():
        found = []
        for order in itertools.permutations(range(3)):
            shuffled = torch.cat([torch.tensor(order), torch.arange(3, 12)])
            found.append(f(layer.weight[:, shuffled], removal.inverse(layer.hessian[shuffled][:, shuffled]), 3)[0])
        spread[name] = float((torch.stack(found).max() - torch.stack(found).min()) / torch.stack(found).mean())
    assert spread["exact"] < 1e-9
    assert spread["diagonal"] < 1e-9
    assert spread["grouped-cholesky"] > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_all_prices_agree_where_inputs_do_not_know_of_each_other(size: int) -> None:
    power = torch.rand(6 * size, dtype=torch.float64) + 0.5
    weight = exact(6, size).weight
    exact_, grouped, diagonal = (f(weight, (1 / power).diag(), size) for f in COMPENSATED.values())
    torch.testing.assert_close(grouped, exact_)
    torch.testing.assert_close(diagonal, exact_)
    torch.testing.assert_close(exact_, (weight.square().sum(0) * power).reshape(6, size).sum(1))


def test_of_single_columns_all_prices_are_one() -> None:
    layer = exact(9)
    first, *rest = (f(layer.weight, removal.inverse(layer.hessian), 1) for f in COMPENSATED.values())
    for other in rest:
        torch.testing.assert_close(other, first)


# -- walks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(1,) * 9, (2, 2, 2, 2, 1), (4, 2, 1, 1, 1), (3, 1, 5), (9,)])
@pytest.mark.parametrize("name", COMPENSATED)
@pytest.mark.parametrize("size", SIZES)
def test_before_every_step_the_weights_are_the_refit_and_the_cheapest_go(
    size: int, name: str, steps: tuple[int, ...]
) -> None:
    layer = exact(9, size)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    sizes = iter(steps)

    def watched(w: Tensor, v: Tensor, left: Tensor) -> Tensor:
        seen.append((w.clone(), v.clone(), left))
        return COMPENSATED[name](w, v, size)

    order = remove_groups(layer.hessian, layer.weight, size, 9, watched, lambda left: next(sizes))
    assert sorted(order) == list(range(9))
    for (w, v, left), step in zip(seen, steps, strict=True):
        refit = refitted(layer.hessian, layer.weight, left)
        torch.testing.assert_close((w, v), refit, rtol=1e-8, atol=1e-9)
        groups = (left[::size] // size).tolist()
        cheapest = [groups[i] for i in COMPENSATED[name](*refit, size).argsort().tolist()]
        now, order = order[:step], order[step:]
        assert now == cheapest[:step]
        assert set(groups) == {*now, *order}


@pytest.mark.parametrize("size", SIZES)
def test_a_walk_that_ends_sooner_is_the_beginning_of_one_that_ends_later(size: int) -> None:
    layer = exact(9, size)
    walk = partial(remove_groups, layer.hessian, layer.weight, size)
    whole = walk(9, price("exact", size), lambda left: max(1, left // 3))
    assert all(walk(k, price("exact", size), lambda left: max(1, left // 3)) == whole[:k] for k in range(1, 9))


@pytest.mark.parametrize("pending", [1, 4, 64])
@pytest.mark.parametrize("picks", [1, 37, 48])
@pytest.mark.parametrize("dense", [0.0, 7 / 8, 1.0])  # gone columns stay in the matrices for good, for a while, never
def test_lazy_removal_takes_the_same_columns_as_plain_removal(
    pending: int, picks: int, dense: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "_PENDING", pending)
    monkeypatch.setattr(removal, "_DENSE", dense)
    layer = exact(48)
    plain = remove_groups(layer.hessian, layer.weight, 1, picks, price("exact", 1), one)
    assert remove_columns(layer.hessian, layer.weight, picks) == plain


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("dense", [0.0, 7 / 8])
def test_removal_starts_afresh_when_the_inverse_has_lost_its_digits(
    lazy: bool, dense: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "_PENDING", 4)
    monkeypatch.setattr(removal, "_DENSE", dense)
    twins = torch.kron(torch.eye(12, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))
    layer = LayerProblem(exact(24).weight, twins, damping=1e-12)  # V_jj falls from 1e12 to 1 with the twin of j
    inverted: list[int] = []
    inverse = removal.inverse
    monkeypatch.setattr(removal, "inverse", lambda h: inverted.append(len(h)) or inverse(h))
    if lazy:
        order = remove_columns(layer.hessian, layer.weight, 24)
    else:
        order = remove_groups(layer.hessian, layer.weight, 1, 24, price("exact", 1), one)
    assert inverted[0] == 24
    assert len(inverted) > 1
    assert {p // 2 for p in order[:12]} == set(range(12))
    merged = layer.weight.unflatten(1, (12, 2)).sum(2).square().sum(0)  # who is left carries both
    assert [p // 2 for p in order[12:]] == merged.argsort().tolist()


# -- without compensation -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_error_of_masking_is_a_quadratic_form_and_above_that_of_the_refit(size: int) -> None:
    layer = exact(6, size)
    q = masked_error(layer.hessian, layer.weight, size)
    assert float(torch.linalg.eigvalsh(q)[0]) > -1e-9
    for gone in itertools.chain(*(itertools.combinations(range(6), k) for k in range(7))):
        kept = [g for g in range(6) if g not in gone]
        masked = float(q[list(gone)][:, list(gone)].sum())
        assert masked == pytest.approx(damped_loss(layer, layer.masked(kept).weight), rel=1e-9, abs=1e-12)
        assert damped_loss(layer, layer.refitted(kept).weight) <= masked + 1e-9


@pytest.mark.parametrize("size", SIZES)
def test_without_compensation_every_removal_is_the_cheapest_by_brute_force(size: int) -> None:
    layer = exact(7, size)
    order = remove_masked(layer.hessian, layer.weight, size, 7)
    for k, taken in enumerate(order):
        left = set(range(7)) - set(order[:k])
        tries = {g: damped_loss(layer, layer.masked(sorted(left - {g})).weight) for g in left}
        assert taken == min(tries, key=tries.__getitem__)
