import itertools

import pytest
import torch

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.obs import OBS
from prunekit_strategies.pruners.obs.penalty import fitted, vanished_set, vanishing

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


@pytest.mark.parametrize("size", SIZES)
def test_no_set_of_as_many_groups_costs_less_than_that_of_the_smallest_weights(size: int) -> None:
    """(5): for fixed weights the penalised error is linear in s, so its minimum over the box is one of these sets."""
    layer = exact(6, size)
    power = layer.weight.square().sum(0).reshape(6, size).sum(1)
    for gone in range(7):
        best = min(float(power[list(some)].sum()) for some in itertools.combinations(range(6), gone))
        chosen = power.argsort(stable=True)[:gone]
        assert float(power[chosen].sum()) == pytest.approx(best)
        box = torch.rand(50, 6, generator=torch.Generator().manual_seed(gone)).double()
        box = (box * gone / box.sum(1, keepdim=True)).clamp_max(1)
        feasible = box[(box.sum(1) - gone).abs() < 1e-12]
        assert (feasible @ power >= best - 1e-9).all()


@pytest.mark.parametrize("size", SIZES)
def test_turns_at_a_fixed_penalty_on_a_set_never_raise_the_penalised_error(size: int) -> None:
    layer, rho, found = exact(6, size), 3.0, list[float]()
    w = layer.weight.double()

    def lost(w: torch.Tensor, chosen: torch.Tensor) -> float:
        power = w.square().sum(0).reshape(6, size).sum(1)
        change = w - layer.weight
        return float((change @ layer.hessian * change).sum() + rho * power[chosen].sum())

    for _ in range(6):
        chosen = w.square().sum(0).reshape(6, size).sum(1).argsort(stable=True)[:3]
        found.append(lost(w, chosen))
        price = torch.zeros(6, dtype=torch.float64).index_fill_(0, chosen, rho).repeat_interleave(size)
        w = fitted(layer.hessian, layer.weight @ layer.hessian, price)
        found.append(lost(w, chosen))
    assert found[1] < found[0]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(found))


@pytest.mark.parametrize("size", SIZES)
def test_what_a_penalty_on_a_set_leaves_is_the_refit_of_the_others(size: int) -> None:
    layer = exact(6, size)
    for keep in (1, 3, 5, 6):
        gone = vanished_set(layer.hessian, layer.weight, size, 6 - keep, 1.3)
        assert len(set(gone)) == 6 - keep
        (found,) = OBS(search="penalty", penalty="set").prune(layer, [keep])
        assert found.kept == tuple(sorted(set(range(6)) - set(gone)))
        torch.testing.assert_close(found.weight, layer.refitted(found.kept or ()).weight)


def test_a_group_without_weights_is_in_every_set() -> None:
    layer = toy_layer(6, 2, quirk="zero weight", dtype=torch.float64, moments=torch.float64)
    assert all(0 in vanished_set(layer.hessian, layer.weight, 2, gone, 1.3) for gone in range(1, 7))
    assert vanished_set(layer.hessian, layer.weight, 2, 0, 1.3) == []


def plain_set(hessian: torch.Tensor, weight: torch.Tensor, size: int, gone: int, growth: float) -> list[int]:
    """(4) to (7) as they are written: a system of all inputs in every round."""
    w, rho = weight, 1e-3 * float(hessian.diagonal().mean())
    first = weight.square().sum(0).unflatten(0, (-1, size)).sum(1)
    while True:
        power = w.square().sum(0).unflatten(0, (-1, size)).sum(1)
        chosen = power.argsort(stable=True)[:gone]
        if not float(power[chosen].sum()) > 1e-6 * float(first[chosen].sum()):
            return chosen.tolist()
        price = torch.zeros_like(power).index_fill_(0, chosen, rho).repeat_interleave(size)
        w = fitted(hessian, weight @ hessian, price)
        rho *= growth


@pytest.mark.parametrize("size", SIZES)
def test_the_sets_are_those_of_the_plain_form(size: int) -> None:
    for seed in range(2):
        layer = exact(8, size, seed)
        for gone in (1, 4, 7, 8):
            found = vanished_set(layer.hessian, layer.weight, size, gone, 1.5)
            assert found == plain_set(layer.hessian, layer.weight, size, gone, 1.5)


def test_a_set_that_changes_on_the_way_and_inputs_that_nearly_say_the_same_are_as_in_the_plain_form() -> None:
    generator, moved = torch.Generator().manual_seed(0), 0
    for _ in range(6):
        few = torch.randn(8, 5, dtype=torch.float64, generator=generator)
        hessian = few @ few.T + 1e-4 * torch.eye(8, dtype=torch.float64)  # rank 5
        weight = torch.randn(6, 8, dtype=torch.float64, generator=generator)
        weight *= 1 + 0.1 * torch.rand(8, dtype=torch.float64, generator=generator) / weight.norm(dim=0)
        first = weight.square().sum(0).argsort(stable=True)[:4].tolist()
        found = vanished_set(hessian, weight, 1, 4, 1.5)
        assert found == plain_set(hessian, weight, 1, 4, 1.5)
        moved += set(found) != set(first)
    assert moved
