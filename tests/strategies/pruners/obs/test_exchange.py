import itertools

import pytest
import torch

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.obs import removal
from prunekit_strategies.pruners.obs.exchange import error_without, exchanged, returns

SIZES = [pytest.param(1, id="columns"), pytest.param(3, id="blocks")]


def exact(n_groups: int, size: int = 1, seed: int = 0) -> LayerProblem:
    return toy_layer(n_groups, size, seed=seed, dtype=torch.float64, moments=torch.float64)


def loss(layer: LayerProblem, gone: list[int]) -> float:
    lost = layer.weight - layer.refitted([g for g in range(layer.n_groups) if g not in gone]).weight
    return float(((lost @ layer.hessian) * lost).sum())


@pytest.mark.parametrize("size", SIZES)
def test_the_error_of_a_set_and_what_returns_save_by_brute_force(size: int) -> None:
    layer = exact(6, size)
    v = removal.inverse(layer.hessian)
    for gone in ([4], [0, 3, 5], [5, 1, 2, 0], [0, 1, 2, 3, 4, 5]):
        assert error_without(v, layer.weight, size, gone) == pytest.approx(loss(layer, gone), rel=1e-9)
        saved = returns(v, layer.weight, size, gone).tolist()
        expected = [loss(layer, gone) - loss(layer, [g for g in gone if g != back]) for back in gone]
        assert saved == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_what_a_return_saves_is_osscars_formula(size: int) -> None:
    layer = exact(6, size)
    h, gone, kept = layer.hessian, [1, 4, 5], [0, 2, 3]
    s = layer.columns(kept)
    saved = returns(removal.inverse(h), layer.weight, size, gone)
    for g, mine in zip(gone, saved.tolist(), strict=True):
        i, r = layer.columns([g]), layer.weight @ h
        gain = torch.linalg.solve(h[s][:, s], h[s][:, i])  # H_SS⁻¹ H_Si
        c, rest = h[i][:, i] - h[i][:, s] @ gain, r[:, i] - r[:, s] @ gain
        assert mine == pytest.approx(float(torch.trace(rest @ torch.linalg.inv(c) @ rest.T)), rel=1e-8)


@pytest.mark.parametrize("most", [1, 2, 8])
@pytest.mark.parametrize("size", SIZES)
def test_exchanges_never_raise_the_error_and_keep_the_count(size: int, most: int) -> None:
    better = 0
    for seed, count in itertools.product(range(4), (1, 3, 5)):
        layer = exact(7, size, seed)
        v, start = removal.inverse(layer.hessian), list(range(count))
        gone = exchanged(layer.hessian, v, layer.weight, size, start, most, 50)
        assert len(set(gone)) == count
        best = min(loss(layer, list(other)) for other in itertools.combinations(range(7), count))
        assert best * (1 - 1e-9) <= loss(layer, gone) <= loss(layer, start)
        better += loss(layer, gone) < 0.99 * loss(layer, start)
    assert better > 6  # the lowest ids are no good choice


def test_from_the_best_set_nothing_is_exchanged() -> None:
    layer = exact(7)
    best = min(itertools.combinations(range(7), 3), key=lambda gone: loss(layer, list(gone)))
    v = removal.inverse(layer.hessian)
    assert sorted(exchanged(layer.hessian, v, layer.weight, 1, list(best), 3, 50)) == list(best)


def test_without_tries_nothing_is_exchanged() -> None:
    layer = exact(7)
    v = removal.inverse(layer.hessian)
    assert exchanged(layer.hessian, v, layer.weight, 1, [0, 1, 2], 3, 0) == [0, 1, 2]
