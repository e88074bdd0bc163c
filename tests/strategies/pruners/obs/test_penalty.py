import itertools

import pytest
import torch

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.obs import OBS
from prunekit_strategies.pruners.obs.penalty import fitted, vanishing

SIZES = [pytest.param(1, id="columns"), pytest.param(3, id="blocks")]


def exact(n_groups: int, size: int = 1, seed: int = 0) -> LayerProblem:
    return toy_layer(n_groups, size, seed=seed, dtype=torch.float64, moments=torch.float64)


def test_the_fit_is_where_the_penalised_error_has_no_slope() -> None:
    layer = exact(8)
    price = torch.rand(8, dtype=torch.float64)
    weight = layer.weight.clone().requires_grad_()
    best = fitted(layer.hessian, layer.weight @ layer.hessian, price).requires_grad_()
    lost = best - weight.detach()
    ((lost @ layer.hessian * lost).sum() + (price * best.square()).sum()).backward()
    assert best.grad is not None
    torch.testing.assert_close(best.grad, torch.zeros_like(best), rtol=0, atol=1e-9)


def test_on_a_fixed_set_a_large_penalty_is_the_refit_without_it() -> None:
    layer = exact(8)
    price = 1e10 * torch.tensor([0, 1, 0, 0, 1, 1, 0, 0], dtype=torch.float64)
    weight = fitted(layer.hessian, layer.weight @ layer.hessian, price)
    torch.testing.assert_close(weight, layer.refitted([0, 2, 3, 6, 7]).weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("r", [1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("size", SIZES)
def test_at_a_fixed_r_no_round_raises_the_penalised_error(size: int, r: float) -> None:
    layer = exact(6, size)
    w, found = layer.weight, []
    for _ in range(30):
        power = w.square().sum(0).reshape(6, size).sum(1)
        lost = w - layer.weight
        found.append(float((lost @ layer.hessian * lost).sum() + r * power.log().sum()))
        if float(power.min()) < 1e-12:
            break
        w = fitted(layer.hessian, layer.weight @ layer.hessian, (r / power).repeat_interleave(size))
    assert len(found) > 2
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(found))


def test_where_inputs_do_not_know_of_each_other_the_smallest_outputs_vanish_first() -> None:
    power = torch.rand(12, dtype=torch.float64) + 0.1
    weight = exact(12).weight
    cost = weight.square().sum(0) * power
    assert vanishing(power.diag(), weight, 1, 12, 1.05) == cost.argsort().tolist()


@pytest.mark.parametrize("size", SIZES)
def test_a_path_that_ends_sooner_is_the_beginning_of_one_that_ends_later(size: int) -> None:
    layer = exact(6, size)
    whole = vanishing(layer.hessian, layer.weight, size, 6, 1.3)
    assert sorted(whole) == list(range(6))
    assert all(vanishing(layer.hessian, layer.weight, size, k, 1.3) == whole[:k] for k in range(1, 6))


def test_a_group_without_weights_vanishes_first() -> None:
    layer = toy_layer(6, 2, quirk="zero weight", dtype=torch.float64, moments=torch.float64)
    assert vanishing(layer.hessian, layer.weight, 2, 1, 1.3) == [0]


def test_comes_nearer_to_greedy_removal_than_prices_of_the_dense_layer_do() -> None:
    def total(pruner: OBS) -> float:
        layers = [exact(32, seed=seed) for seed in range(4)]
        return sum(layer.error(c.weight) for layer in layers for c in pruner.prune(layer, [24, 16, 8]))

    assert total(OBS(search="penalty")) < total(OBS(search="score"))
    assert total(OBS(search="penalty")) < 1.2 * total(OBS())
