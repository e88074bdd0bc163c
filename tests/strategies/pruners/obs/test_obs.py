import itertools
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit.testing.layers import damped_loss
from prunekit_strategies.pruners.obs import OBS
from prunekit_strategies.pruners.obs.obs import Score, _at_once

SIZES = [pytest.param(1, id="columns"), pytest.param(3, id="blocks")]


def exact(n_groups: int, size: int = 1, seed: int = 0, **changes: object) -> LayerProblem:
    layer = toy_layer(n_groups, size, seed=seed, dtype=torch.float64, moments=torch.float64)
    return replace(layer, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES)
def test_every_removal_is_the_cheapest_by_brute_force(size: int, seed: int) -> None:
    layer = exact(7, size, seed)
    candidates = OBS().prune(layer, range(7, -1, -1))
    for before, after in itertools.pairwise(candidates):
        assert before.kept is not None
        tries = {g: damped_loss(layer, layer.refitted([k for k in before.kept if k != g]).weight) for g in before.kept}
        cheapest = min(tries, key=tries.__getitem__)
        assert set(before.kept) - set(after.kept or ()) == {cheapest}
        assert damped_loss(layer, after.weight) == pytest.approx(tries[cheapest], rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_the_refit_of_the_kept_groups(size: int) -> None:
    layer = exact(7, size)
    for candidate in OBS().prune(layer, range(7)):
        torch.testing.assert_close(candidate.weight, layer.refitted(candidate.kept or ()).weight, rtol=1e-8, atol=1e-9)


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
        cross=weight @ x.T @ seen / 300,
        energy=float((x @ weight.T).square().sum() / 300),
    )
    keeps = [3, 6, 9, 12]
    aimed, plain = OBS(aim="dense").prune(layer, keeps), OBS().prune(layer, keeps)
    assert all(layer.error(a.weight) < layer.error(p.weight) for a, p in zip(aimed, plain, strict=True))
    torch.testing.assert_close(aimed[-1].weight, layer.target.float())
    assert torch.equal(plain[-1].weight, weight)


def test_on_dense_inputs_both_aims_are_one() -> None:
    layer = exact(7)
    dense = replace(layer, cross=layer.weight @ layer.gram, energy=1.0)
    for one, two in zip(OBS().prune(layer, range(8)), OBS(aim="dense").prune(dense, range(8)), strict=True):
        assert one.kept == two.kept
        torch.testing.assert_close(one.weight, two.weight, rtol=1e-8, atol=1e-9)


def test_the_aim_says_what_calibration_must_collect():
    needs = {aim: OBS(aim=aim).needs for aim in ("own", "dense", "stream")}
    assert needs == {"own": {"gram"}, "dense": {"gram", "cross"}, "stream": {"gram", "cross", "drift"}}
    with pytest.raises(ValueError, match="no aim 'maybe'; there are own, dense, stream"):
        OBS(aim="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("aim", ["dense", "stream"])
def test_a_correction_goes_a_part_of_the_way_to_the_target(aim: Any) -> None:
    plain, generator = exact(6, 2), torch.Generator().manual_seed(0)
    lost, shifted = (torch.randn(plain.weight.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    layer = replace(plain, cross=plain.weight @ plain.gram + shifted, drift=lost, energy=1e3)
    target = (layer if aim == "stream" else replace(layer, drift=None)).target
    for share in (0.0, 0.3, 1.0):
        aimed = OBS(aim=aim, correction=share).nested(layer)
        assert aimed is not None
        expected = layer.weight + share * (target - layer.weight)
        torch.testing.assert_close(aimed.layer.target, expected, rtol=1e-9, atol=1e-9)
    for one, two in zip(OBS(aim=aim, correction=0.0).prune(layer, range(7)), OBS().prune(plain, range(7)), strict=True):
        assert one.kept == two.kept
        torch.testing.assert_close(one.weight, two.weight, rtol=1e-7, atol=1e-8)
    with pytest.raises(ValueError, match=r"a correction is a share in 0\.\.1, not 1\.5"):
        OBS(aim=aim, correction=1.5)


# -- other searches and scores ------------------------------------------------------------------------


def gone(pruner: OBS, layer: LayerProblem) -> list[int]:
    """Group ids in the order of removal, by nested answers."""
    kept = [set(c.kept or ()) for c in pruner.prune(layer, range(layer.n_groups, -1, -1))]
    return [(large - small).pop() for large, small in itertools.pairwise(kept)]


@pytest.mark.parametrize("options", [{"step": (1, 1)}, {"score": "diagonal"}, {"score": "grouped-cholesky"}])
def test_neurons_one_by_one_are_the_classic_surgeon_whatever_the_price(options: dict[str, Any]) -> None:
    layer = exact(24)
    assert gone(OBS(**options), layer) == gone(OBS(), layer)


def test_heads_go_by_the_price_that_is_asked() -> None:
    orders = {score: [gone(OBS(score=score), exact(6, 3, seed)) for seed in range(8)] for score in get_args(Score)}
    assert len({str(order) for order in orders.values()}) == len(orders)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{"step": (2, 2), "head_step": 2}, {"step": (4, 16)}, {"search": "score"}])
def test_weights_are_the_refit_after_every_schedule(options: dict[str, Any], size: int) -> None:
    layer = exact(9, size)
    for candidate in OBS(**options).prune(layer, range(9)):
        torch.testing.assert_close(candidate.weight, layer.refitted(candidate.kept or ()).weight, rtol=1e-8, atol=1e-9)


def test_a_step_takes_the_cheapest_together() -> None:
    layer = exact(12)
    rise = layer.weight.square().sum(0) / torch.linalg.inv(layer.hessian).diagonal()
    assert gone(OBS(step=(5, 5)), layer)[:5] == rise.argsort()[:5].tolist()
    assert gone(OBS(search="score"), layer) == rise.argsort().tolist()


def test_steps_shrink_with_what_is_left() -> None:
    assert [_at_once(n, 8, 1024) for n in (28672, 11008, 4096, 2048, 1023, 256, 255, 100, 3)] == [
        *(1024, 512, 256, 128, 32, 16, 8, 8, 8)
    ]
    assert {_at_once(n, 1, 1) for n in range(1, 100)} == {1}
    assert {_at_once(n, 16, 16) for n in (1, 300, 5000)} == {16}


@pytest.mark.parametrize("size", SIZES)
def test_swaps_never_raise_the_error_of_a_count_and_often_lower_it(size: int) -> None:
    lower = 0
    for seed in range(6):
        layer = exact(16 if size == 1 else 8, size, seed)
        counts = range(layer.n_groups + 1)
        for plain, swapped in zip(OBS().prune(layer, counts), OBS(search="swap").prune(layer, counts), strict=True):
            assert len(swapped.kept or ()) == len(plain.kept or ())
            before, after = damped_loss(layer, plain.weight), damped_loss(layer, swapped.weight)
            assert after <= before * (1 + 1e-9) + 1e-12
            lower += after < before * (1 - 1e-6)
    assert lower >= 3


def test_wanda_scores_by_hand() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 2.0, 1.0, -2.0]])  # sums of |W_ij|: 3, 3, 1, 4
    power = torch.tensor([4.0, 1.0, 49.0, 0.25])  # norms: 2, 1, 7, 0.5; scores: 6, 3, 7, 2
    layer = LayerProblem(weight, torch.diag(power))
    assert gone(OBS(search="score", score="wanda"), layer) == [3, 1, 0, 2]
    assert gone(OBS(search="score", score="wanda"), replace(layer, group_size=2)) == [1, 0]  # 9 and 9: the lower stays


def test_masked_scores_are_errors_of_masking_one_group() -> None:
    layer = exact(6, 3)
    alone = [damped_loss(layer, layer.masked([k for k in range(6) if k != g]).weight) for g in range(6)]
    assert gone(OBS(search="score", score="masked"), layer) == sorted(range(6), key=alone.__getitem__)


@pytest.mark.parametrize("search", ["greedy", "score", "swap", "penalty"])
def test_without_refit_the_weights_are_as_they_were(search: Any) -> None:
    layer = exact(7, 2)
    for plain, fitted in zip(
        OBS(search=search, refit=False).prune(layer, range(8)), OBS(search=search).prune(layer, range(8)), strict=True
    ):
        assert plain.kept == fitted.kept
        assert torch.equal(plain.weight, layer.masked(plain.kept or ()).weight)


@pytest.mark.parametrize("size", SIZES)
def test_first_order_terms_sum_to_the_power_of_the_output(size: int) -> None:
    """So they are no slope of the error, which is zero at the dense weight."""
    layer = exact(6, size)
    reached = layer.weight @ layer.hessian
    slopes = (layer.weight * reached).sum(0)
    assert float(slopes.sum()) == pytest.approx(float(((layer.weight @ layer.hessian) * layer.weight).sum()))
    rise = torch.tensor([damped_loss(layer, layer.refitted([k for k in range(6) if k != g]).weight) for g in range(6)])
    signed = rise / 2 + slopes.reshape(6, size).sum(1)
    absolute = rise / 2 + slopes.abs().reshape(6, size).mean(1)
    assert gone(OBS(first_order="signed"), layer)[0] == int(signed.argmin())
    assert gone(OBS(first_order="absolute"), layer)[0] == int(absolute.argmin())


def test_the_first_order_term_chooses_worse() -> None:
    layers = [exact(32, seed=seed) for seed in range(4)]
    none, absolute, signed = (
        sum(layer.error(c.weight) for layer in layers for c in OBS(first_order=term).prune(layer, [24, 16, 8]))
        for term in ("none", "absolute", "signed")
    )
    assert none < 0.95 * min(absolute, signed)


@pytest.mark.parametrize("size", SIZES)
def test_scores_are_the_rises_of_the_error_on_the_way_down(size: int) -> None:
    layer = exact(7, size)
    scores = OBS().scores(layer)
    losses = [damped_loss(layer, c.weight) for c in OBS().prune(layer, range(7, -1, -1))]
    rises = [after - before for before, after in itertools.pairwise(losses)]
    assert scores[gone(OBS(), layer)].tolist() == pytest.approx(rises, rel=1e-8)
