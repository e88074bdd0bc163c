"""The algebra every pruner stands on, in float64."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem, PluginError, best_groups
from prunekit.layer import problem as problem_of
from prunekit.layer.candidates import ranked
from prunekit.layer.problem import Producer
from prunekit.layer.solving import margin
from prunekit.testing import toy_layer, with_statistics
from prunekit.testing.layers import QUIRKS, Quirk
from prunekit.testing.shapes import SINGULAR
from prunekit.testing.statistics import Peak

SIZES = [pytest.param(1, id="columns"), pytest.param(3, id="blocks")]


def exact(n_groups: int = 6, size: int = 1, **changes: object) -> LayerProblem:
    layer = toy_layer(n_groups, size, dtype=torch.float64, moments=torch.float64)
    return replace(layer, **changes)  # type: ignore[arg-type]


def shifted(n_groups: int = 6, size: int = 1, damping: float = 0.01) -> tuple[LayerProblem, Tensor, Tensor]:
    """A problem whose layer sees other inputs than the dense model's; those inputs x and x̂, (tokens, d_in)."""
    generator = torch.Generator().manual_seed(3)
    d_in = n_groups * size
    mix = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    x = torch.randn(200, d_in, generator=generator, dtype=torch.float64) @ mix
    seen = x + 0.3 * torch.randn(200, d_in, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, d_in, generator=generator, dtype=torch.float64)
    layer = LayerProblem(
        weight,
        seen.T @ seen / 200,
        group_size=size,
        damping=damping,
        cross=weight @ x.T @ seen / 200,
        energy=float((x @ weight.T).square().sum() / 200),
    )
    return layer, x, seen


def damped_loss(layer: LayerProblem, weight: Tensor) -> float:
    lost = layer.target - weight
    return float(((lost @ layer.hessian) * lost).sum())


@pytest.mark.parametrize("size", SIZES)
def test_refit_satisfies_its_normal_equations(size: int) -> None:
    for layer in (exact(size=size), shifted(size=size)[0]):
        candidate = layer.refitted([0, 3, 4])
        kept = layer.columns([0, 3, 4])
        slope = (candidate.weight - layer.target) @ layer.hessian
        torch.testing.assert_close(slope[:, kept], torch.zeros_like(slope[:, kept]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_refit_is_no_worse_than_mask(size: int) -> None:
    layer = exact(size=size)
    for groups in itertools.combinations(range(6), 3):
        assert damped_loss(layer, layer.refitted(groups).weight) <= damped_loss(layer, layer.masked(groups).weight)


@pytest.mark.parametrize("size", SIZES)
def test_refit_is_the_compensation_by_the_inverse_hessian(size: int) -> None:
    layer = exact(size=size)
    gone = layer.columns([1, 2, 5])
    v, w = torch.linalg.inv(layer.hessian), layer.weight
    gain = torch.linalg.solve(v[gone][:, gone], v[gone])
    refit = layer.refitted([0, 3, 4]).weight
    torch.testing.assert_close(refit, w - w[:, gone] @ gain, rtol=1e-9, atol=1e-9)
    rise = (w[:, gone] @ torch.linalg.solve(v[gone][:, gone], w[:, gone].T)).trace()
    assert damped_loss(layer, refit) == pytest.approx(float(rise), rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_mask_alone_costs_a_quadratic_form_in_what_is_removed(size: int) -> None:
    layer = exact(size=size)
    q = torch.ones(layer.d_in, dtype=torch.float64)
    q[layer.columns([0, 3, 4])] = 0
    form = q @ ((layer.weight.T @ layer.weight) * layer.gram) @ q
    power = float(((layer.weight @ layer.gram) * layer.weight).sum())
    assert layer.error(layer.masked([0, 3, 4]).weight) == pytest.approx(float(form) / power, rel=1e-9)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_nested_equals_independent_refits_at_every_count(size: int, asymmetric: bool) -> None:
    layer = shifted(size=size)[0] if asymmetric else exact(size=size)
    ranking = [4, 0, 5, 2, 1, 3]
    nested = layer.nested(ranking)
    losses = nested.losses
    for keep, candidate in enumerate(nested.candidates(range(7))):
        refit = layer.refitted(ranking[:keep])
        assert candidate.kept == refit.kept
        torch.testing.assert_close(candidate.weight, refit.weight, rtol=1e-8, atol=1e-9)
        assert float(losses[keep]) == pytest.approx(damped_loss(layer, refit.weight), rel=1e-8, abs=1e-9)


def test_nested_losses_fall_to_zero_as_more_is_kept() -> None:
    losses = exact().nested(range(6)).losses
    assert bool((losses.diff() <= 0).all())
    assert float(losses[-1]) == 0


def test_keeping_all_returns_the_weight_bit_for_bit() -> None:
    layer = exact()
    for candidate in (layer.masked(range(6)), layer.refitted(range(6)), *layer.nested(range(6)).candidates([6])):
        assert torch.equal(candidate.weight, layer.weight)
        assert candidate.weight is not layer.weight


@pytest.mark.parametrize("size", SIZES)
def test_asymmetric_error_is_the_output_error_on_both_inputs(size: int) -> None:
    layer, x, seen = shifted(size=size)
    pruned = layer.masked([0, 2, 3]).weight
    dense = x @ layer.weight.T
    brute = (dense - seen @ pruned.T).square().sum() / dense.square().sum()
    assert layer.error(pruned) == pytest.approx(float(brute), rel=1e-9)


def test_asymmetric_refit_is_least_squares_on_the_tokens() -> None:
    layer, x, seen = shifted(damping=0.0)
    kept = [0, 2, 3]
    direct = torch.linalg.lstsq(seen[:, kept], x @ layer.weight.T).solution.T
    torch.testing.assert_close(layer.refitted(kept).weight[:, kept], direct, rtol=1e-8, atol=1e-8)


def test_asymmetric_loss_is_symmetric_loss_on_the_target_and_a_constant() -> None:
    layer, *_ = shifted(damping=0.0)
    assert layer.energy is not None
    gaps = [
        layer.error(layer.masked(groups).weight) - damped_loss(layer, layer.masked(groups).weight) / layer.energy
        for groups in itertools.combinations(range(6), 3)
    ]
    assert max(gaps) - min(gaps) < 1e-10
    assert layer.error(layer.target) == pytest.approx(gaps[0], abs=1e-10)


def test_damping_draws_towards_the_weight_not_towards_zero() -> None:
    layer = exact(damping=1e6)
    torch.testing.assert_close(layer.refitted([0, 3]).weight, layer.masked([0, 3]).weight, rtol=1e-4, atol=1e-4)
    same = replace(layer, cross=layer.weight @ layer.gram, energy=1.0)
    torch.testing.assert_close(same.target, layer.weight, rtol=1e-9, atol=1e-9)


def test_constant_column_can_carry_the_means_of_what_is_gone() -> None:
    layer = toy_layer(quirk="constant", dtype=torch.float64, moments=torch.float64)
    tiny = replace(layer, damping=1e-9)
    bias = (tiny.weight[:, 1:] * tiny.require("mean")[1:]).sum(1)
    torch.testing.assert_close(tiny.refitted([0]).weight[:, 0], tiny.weight[:, 0] + bias, rtol=1e-5, atol=1e-5)
    assert tiny.error(tiny.refitted([0]).weight) < tiny.error(tiny.masked([0]).weight)


def test_duplicate_can_be_folded_into_its_twin() -> None:
    layer = toy_layer(quirk="duplicate", dtype=torch.float64, moments=torch.float64)
    layer = replace(layer, damping=1e-10)
    refit = layer.refitted([0, 2, 3, 4, 5])
    torch.testing.assert_close(refit.weight[:, 0], 2 * layer.weight[:, 0], rtol=1e-6, atol=1e-6)
    assert layer.error(refit.weight) < 1e-9


def test_ridge_grows_until_the_hessian_has_a_factor() -> None:
    layer = toy_layer(quirk="low rank", dtype=torch.float64, moments=torch.float64)
    assert replace(layer, damping=0.01).ridge == pytest.approx(0.01 * float(layer.gram.diagonal().mean()))
    saved = replace(layer, gram=layer.gram - 1e-6 * torch.eye(6, dtype=torch.float64), damping=0.0)
    assert saved.ridge > 1e-6
    indefinite = LayerProblem(torch.ones(1, 2), torch.tensor([[1.0, 1.5], [1.5, 1.0]]), damping=1e-4)
    assert indefinite.ridge == pytest.approx(1.0)  # after four times ten
    assert bool(torch.isfinite(saved.refitted([1, 2]).weight).all())


def test_ridge_asks_for_more_than_one_lucky_factor() -> None:
    eps = 2.0**-52  # 1 + ε - 1·1 = ε has a root on any processor; 1 - 1·1 in the other order has none
    gram = torch.tensor([[1, 1], [1, 1 + eps]], dtype=torch.float64)
    assert not bool(torch.linalg.cholesky_ex(gram).info)
    assert bool(torch.linalg.cholesky_ex(gram.flip(0, 1)).info)
    layer = LayerProblem(torch.ones(1, 2, dtype=torch.float64), gram, damping=0.0)
    assert layer.ridge == pytest.approx(1e-8)
    for candidate in (layer.refitted([1]), *layer.nested([1, 0]).candidates([1])):
        torch.testing.assert_close(candidate.weight, torch.tensor([[0.0, 2.0]]).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quirk", ["duplicate", "dead", "low rank", "loud"])
@pytest.mark.parametrize("damping", [0.0, 1e-16, 1e-13])
def test_hessian_of_a_singular_layer_is_positive_with_a_margin(quirk: Quirk, damping: float) -> None:
    for n_groups, group_size, d_out, seed in [*SINGULAR, *((6, size, 1, seed) for size in (1, 3) for seed in range(9))]:
        layer = replace(toy_layer(n_groups, group_size, d_out, quirk=quirk, seed=seed), damping=damping)
        scale = layer.hessian.diagonal().sqrt()
        least = float(torch.linalg.eigvalsh(layer.hessian / scale / scale[:, None])[0])
        assert least > margin(layer.d_in) / 2  # no trouble from rounding here: eigvalsh is out by a few ε
        for groups in itertools.permutations(range(n_groups), min(n_groups, 3)):
            columns = layer.columns(groups)
            assert not bool(torch.linalg.cholesky_ex(layer.hessian[columns][:, columns]).info)


@pytest.mark.parametrize("quirk", QUIRKS)
def test_with_the_usual_damping_ridge_is_what_was_asked_for(quirk: Quirk) -> None:
    for layer in (toy_layer(quirk=quirk), toy_layer(200, quirk=quirk, dtype=torch.float64)):
        scale = float(layer.gram.diagonal().double().mean())
        assert layer.ridge == (0.01 * scale if scale else 1.0)


def test_ridge_above_what_was_asked_for_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "prunekit"):
        assert replace(toy_layer(), damping=0.0).ridge == 0
        assert not caplog.messages
        assert replace(toy_layer(quirk="dead"), damping=0.0).ridge > 0
    assert caplog.messages == ["dead toy: damping is 1.0e-08, not 0.0e+00, for H is singular"]


@pytest.mark.parametrize("tile", [1, 4, 512])
def test_a_gram_whose_halves_differ_by_rounding_is_one_matrix_in_every_order(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem_of, "TILE", tile)
    layer = toy_layer(quirk="duplicate", dtype=torch.float64)
    noise = 1e-7 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    crooked = replace(layer, gram=layer.gram * (1 + noise.triu(1)), damping=0.0)
    assert torch.equal(crooked.hessian, replace(layer, damping=0.0).hessian)
    for order in list(itertools.permutations(range(6)))[::7]:
        assert bool(torch.isfinite(crooked.nested(order).losses).all())


def test_what_half_floats_cannot_hold_becomes_their_largest() -> None:
    layer = toy_layer(dtype=torch.float16)
    weight = torch.tensor([[1.0, -1e6], [65504.0, 1e300]]).double()
    assert layer.rounded(weight).tolist() == [[1.0, -65504.0], [65504.0, 65504.0]]
    assert layer.rounded(weight).dtype == torch.float16


def test_gram_that_is_no_second_moment_is_refused_by_name() -> None:
    broken = LayerProblem(torch.ones(2, 2), torch.tensor([[1.0, 50.0], [50.0, 1.0]]), damping=1e-9, name="block 3")
    with pytest.raises(ValueError, match=r"block 3.*Cholesky.*damping"):
        broken.refitted([0])


@pytest.mark.parametrize("part", ["weight", "gram", "cross", "mean", "absolute", "contrast", "fisher", "influence"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(part: str, value: float) -> None:
    layer = toy_layer()
    bad = torch.ones_like(layer.weight if part in ("weight", "cross") else layer.require(part))
    bad.view(-1)[0] = value
    with pytest.raises(ValueError, match=f"plain toy: its {part} is not finite"):
        with_statistics(layer, **{part: bad}) if part in layer.statistics else replace(layer, **{part: bad})


@pytest.mark.parametrize("part", ["weight", "power", "gradient", "fisher"])
def test_a_feeder_that_is_not_finite_is_refused_by_name(part: str) -> None:
    layer = toy_layer()
    producer = layer.producers[0]
    bad = (producer.weight if part == "weight" else producer.require(part)).clone()
    bad.view(-1)[0] = torch.nan
    other = {"weight": bad} if part == "weight" else {"statistics": {**producer.statistics, part: bad}}
    with pytest.raises(ValueError, match=f"plain toy: wide's {part} is not finite"):
        replace(layer, producers=(replace(producer, **other),))  # type: ignore[arg-type]


def test_what_is_required_is_there_or_the_sentence_says_what_to_do() -> None:
    layer = toy_layer(needs={Peak()})
    assert torch.equal(layer.require("mean"), layer.statistics["mean"])
    assert layer.require(Peak()) is layer.require("peak")
    assert layer.require("gram") is layer.gram
    told = layer.restricted_to(frozenset({"variance", "gradient"}))
    for owner, have in ((told, "fisher, gradient, gram, variance"), (layer.producers[0], "fisher, gradient, power")):
        sentence = f"no statistic 'cross': a plug-in has to name it in its `needs`; there are {have}"
        with pytest.raises(PluginError, match=f"^{owner.name} has {sentence}$"):
            owner.require("cross")


def test_a_layer_knows_what_is_asked_for_and_no_more() -> None:
    layer = toy_layer(needs={Peak()})
    layer = replace(layer, cross=layer.weight, drift=layer.weight, energy=1.0)

    def known(*needs: str | Peak) -> tuple[LayerProblem, set[str], list[set[str]]]:
        told = layer.restricted_to(frozenset(needs))
        return told, {*told.statistics}, [{*producer.statistics} for producer in told.producers]

    assert known("gram")[1:] == (set(), [])
    assert known("mean", Peak())[1:] == ({"mean", "peak"}, [])
    assert known("gradient")[1:] == ({"gradient", "fisher"}, [])
    assert known("gradient", "producers")[1:] == ({"gradient", "fisher"}, [{"gradient", "fisher"}] * 2)
    assert known("power")[1:] == (set(), [{"power"}] * 2)
    assert known("producers")[1:] == (set(), [set()] * 2)
    for needs, cross, drift in ((("mean",), False, False), (("cross",), True, False), (("drift",), True, True)):
        told, *_ = known(*needs)
        assert (told.cross is not None, told.energy is not None, told.drift is not None) == (cross, cross, drift)


def test_rows_that_are_no_equal_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="7 rows of up, 6 groups"):
        replace(toy_layer(), producers=(Producer("up", torch.ones(7, 2)),))


def test_half_precision_weights_are_finite_however_many() -> None:
    LayerProblem(torch.full((1000, 4), 1000.0, dtype=torch.float16), torch.eye(4))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises((ValueError, TypeError), match="gram"):  # TypeError where shapes are checked at run time
        LayerProblem(torch.ones(2, 4), torch.eye(3))
    with pytest.raises(ValueError, match="divides"):
        LayerProblem(torch.ones(2, 4), torch.eye(4), group_size=3)


def test_group_sum_adds_half_precision_exactly() -> None:
    layer = LayerProblem(torch.full((4096, 2), 1.0, dtype=torch.bfloat16), torch.eye(2))
    assert layer.group_sum(layer.weight).tolist() == [4096.0, 4096.0]


def test_best_groups_are_exact_on_ties_and_prefer_lower_ids() -> None:
    score = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert ranked(score) == [1, 3, 0, 2, 4]
    assert best_groups(score, [3, 0, 5, 1]) == [[0, 1, 3], [], [0, 1, 2, 3, 4], [1]]


def test_scores_that_are_not_finite_are_refused_with_their_group() -> None:
    with pytest.raises(ValueError, match="group 1 is not"):
        ranked(torch.tensor([1.0, float("nan")]))


def test_with_a_drift_the_target_is_the_least_squares_answer_to_the_whole_sum():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 6, generator=generator).double()
    seen = x + 0.3 * torch.randn(400, 6, generator=generator).double()
    lost = seen @ torch.randn(6, 4, generator=generator).double() * 0.2
    weight = torch.randn(4, 6, generator=generator).double()
    layer = LayerProblem(
        weight=weight,
        gram=seen.T @ seen / 400,
        cross=weight @ x.T @ seen / 400,
        drift=lost.T @ seen / 400,
        energy=float((x @ weight.T).square().sum() / 400),
        damping=0.0,
    )
    by_hand = torch.linalg.lstsq(seen, x @ weight.T + lost).solution.T
    torch.testing.assert_close(layer.target, by_hand)
    kept = torch.linalg.lstsq(seen[:, :3], x @ weight.T + lost).solution.T
    torch.testing.assert_close(layer.refitted([0, 1, 2]).weight[:, :3], kept)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_nested_prices_in_nats_are_the_quadratic_form_at_every_count(size: int, asymmetric: bool) -> None:
    layer = shifted(size=size)[0] if asymmetric else exact(size=size)
    fisher = toy_layer(6, size, len(layer.weight), needs={"output-fisher"}).statistics["output-fisher"].double()
    layer = with_statistics(layer, **{"output-fisher": fisher})
    root = layer.output_root
    weighed = fisher + 0.01 * fisher.diagonal().mean() * torch.eye(len(fisher))
    torch.testing.assert_close(root.T @ root, weighed)
    ranking = [4, 0, 5, 2, 1, 3]
    nats = layer.nested(ranking).nats(root)
    for keep in range(7):
        refit = layer.refitted(ranking[:keep]).weight
        off = layer.target - refit
        price = float(0.5 * torch.trace(weighed @ off @ layer.hessian @ off.T))
        assert layer.nats(refit, root) == pytest.approx(price, rel=1e-8, abs=1e-10)
        assert float(nats[keep]) == pytest.approx(price, rel=1e-8, abs=1e-9)


def test_where_nobody_reads_the_output_nothing_costs_nats() -> None:
    layer = with_statistics(exact(), **{"output-fisher": torch.zeros(5, 5)})
    assert bool((layer.nested(range(6)).nats(layer.output_root) == 0).all())


def test_errors_of_nested_refits_are_those_of_their_candidates() -> None:
    layer = replace(shifted()[0], damping=1e-9)
    nested = layer.nested([4, 0, 5, 2, 1, 3])
    one_by_one = [layer.error(candidate.weight) for candidate in nested.candidates(range(7))]
    assert layer.errors(nested).tolist() == pytest.approx(one_by_one, rel=1e-5, abs=1e-7)
