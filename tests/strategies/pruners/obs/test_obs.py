import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.obs import OBS, removal

SIZES = [pytest.param(1, id="columns"), pytest.param(3, id="blocks")]


def exact(n_groups: int, size: int = 1, seed: int = 0, **changes: object) -> LayerProblem:
    layer = toy_layer(n_groups, size, seed=seed, dtype=torch.float64, moments=torch.float64)
    return replace(layer, **changes)  # type: ignore[arg-type]


def loss(layer: LayerProblem, weight: Tensor) -> float:
    lost = layer.target - weight
    return float(((lost @ layer.hessian) * lost).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES)
def test_every_removal_is_the_cheapest_by_brute_force(size: int, seed: int) -> None:
    layer = exact(7, size, seed)
    candidates = OBS().prune(layer, range(7, -1, -1))
    for before, after in itertools.pairwise(candidates):
        assert before.kept is not None
        tries = {g: loss(layer, layer.refitted([k for k in before.kept if k != g]).weight) for g in before.kept}
        cheapest = min(tries, key=tries.__getitem__)
        assert set(before.kept) - set(after.kept or ()) == {cheapest}
        assert loss(layer, after.weight) == pytest.approx(tries[cheapest], rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_the_refit_of_the_kept_groups(size: int) -> None:
    layer = exact(7, size)
    for candidate in OBS().prune(layer, range(7)):
        torch.testing.assert_close(candidate.weight, layer.refitted(candidate.kept or ()).weight, rtol=1e-8, atol=1e-9)


def test_compensation_does_not_depend_on_the_order_of_removal() -> None:
    layer = exact(7)
    order = [5, 1, 3]
    expected = layer.refitted([0, 2, 4, 6]).weight
    for seed in range(3):
        random.Random(seed).shuffle(order)
        w, v = layer.weight.clone(), torch.linalg.inv(layer.hessian)
        for p in order:
            gain = v[p : p + 1] / v[p, p]
            w, v = w - w[:, p : p + 1] @ gain, v - v[:, p : p + 1] @ gain
        torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_error_is_no_more_than_masking_the_same_groups_and_falls_with_the_count(size: int) -> None:
    layer = exact(7, size)
    candidates = OBS().prune(layer, range(8))
    errors = [loss(layer, c.weight) for c in candidates]
    assert errors == sorted(errors, reverse=True)
    assert all(e <= loss(layer, layer.masked(c.kept or ()).weight) for e, c in zip(errors, candidates, strict=True))


def test_answers_are_nested() -> None:
    kept = [set(c.kept or ()) for c in OBS().prune(exact(9), range(10))]
    assert all(small < large for small, large in itertools.pairwise(kept))


@pytest.mark.parametrize("size", SIZES)
def test_dead_groups_go_first_and_cost_nothing(size: int) -> None:
    layer = toy_layer(6, size, quirk="dead", dtype=torch.float64, moments=torch.float64)
    layer = replace(layer, weight=layer.weight + 100 * (torch.arange(layer.d_in) < size))
    one_less, rest = OBS().prune(layer, [5, 1])
    assert one_less.kept == (1, 2, 3, 4, 5)
    assert layer.error(one_less.weight) == pytest.approx(0, abs=1e-12)
    assert 0 not in (rest.kept or ())


def test_one_of_two_duplicates_goes_early_and_for_almost_nothing() -> None:
    layer = toy_layer(6, quirk="duplicate", dtype=torch.float64, moments=torch.float64)
    (candidate,) = OBS().prune(replace(layer, damping=1e-6), [5])
    assert len({0, 1} & set(candidate.kept or ())) == 1
    assert layer.error(candidate.weight) < 1e-6


def test_on_a_tie_the_lower_id_stays() -> None:
    layer = LayerProblem(torch.ones(2, 5), torch.eye(5))
    assert [c.kept for c in OBS().prune(layer, [1, 3, 4])] == [(0,), (0, 1, 2), (0, 1, 2, 3)]
    blocks = LayerProblem(torch.ones(2, 6), torch.eye(6), group_size=2)
    assert [c.kept for c in OBS().prune(blocks, [1, 2])] == [(0,), (0, 1)]


def test_it_aims_at_the_dense_output_and_is_better_there() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    seen = x + torch.randn(300, 12, generator=generator)
    weight = torch.randn(4, 12, generator=generator)
    layer = LayerProblem(
        weight,
        seen.T @ seen / 300,
        cross=x.T @ seen / 300,
        energy=float((x @ weight.T).square().sum() / 300),
    )
    keeps = [3, 6, 9, 12]
    aimed, plain = OBS(aim="dense").prune(layer, keeps), OBS().prune(layer, keeps)
    assert all(layer.error(a.weight) < layer.error(p.weight) for a, p in zip(aimed, plain, strict=True))
    torch.testing.assert_close(aimed[-1].weight, layer.target.float())
    assert torch.equal(plain[-1].weight, weight)


def test_on_dense_inputs_both_aims_are_one() -> None:
    layer = exact(7)
    dense = replace(layer, cross=layer.gram, energy=1.0)
    for one, two in zip(OBS().prune(layer, range(8)), OBS(aim="dense").prune(dense, range(8)), strict=True):
        assert one.kept == two.kept
        torch.testing.assert_close(one.weight, two.weight, rtol=1e-8, atol=1e-9)


def test_the_aim_says_what_calibration_must_collect():
    needs = {aim: OBS(aim=aim).needs for aim in ("own", "dense", "stream")}
    assert needs == {"own": {"gram"}, "dense": {"gram", "cross"}, "stream": {"gram", "cross", "drift"}}
    with pytest.raises(ValueError, match="aim is one of own, dense, stream"):
        OBS(aim="maybe")  # type: ignore[arg-type]
