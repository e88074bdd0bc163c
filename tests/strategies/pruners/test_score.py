from dataclasses import replace
from typing import Any

import pytest
import torch

from prunekit import LayerProblem
from prunekit.layer.problem import Producer
from prunekit.space.forms import WEIGHTS, Pattern
from prunekit.testing import toy_layer, with_statistics
from prunekit_strategies.pruners.olica import Olica
from prunekit_strategies.pruners.score import (
    ACE,
    FASP,
    FLAP,
    ACECombined,
    ACEDirection,
    Channel,
    FLAPNorm,
    FLAPVariance,
    Magnitude,
    Minitron,
    SafetyPotential,
    Score,
    Wanda,
)

WEIGHT = torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 2.0, 1.0, -2.0]])  # Σ|W_ij|: 3, 3, 1, 4; ΣW²: 9, 5, 1, 8
GRAM = torch.diag(torch.tensor([4.0, 1.0, 49.0, 0.25]))  # rms: 2, 1, 7, 0.5
HAND = LayerProblem(
    WEIGHT,
    GRAM,
    statistics={
        "variance": torch.tensor([4.0, 0.64, 0.0, 0.0]),
        "absolute": torch.tensor([1.5, 0.5, 7.0, 0.5]),
        "contrast": torch.tensor([3.0, 2.0, 0.0, 0.25]),
        "relative": torch.tensor([0.16, 0.09, 0.04, 0.01]),
    },
    producers=(Producer("up", torch.tensor([[0.0], [0.0], [3.0], [1.0]]), {"power": torch.tensor([4.0])}),),
)
PAIRS = replace(HAND, group_size=2)
CASES: list[tuple[Any, list[float], list[float]]] = [  # by column, by pair of columns
    (Wanda(), [6, 3, 7, 2], [9, 9]),
    (FASP(), [6, 3, 7, 2], [9, 9]),
    (Magnitude(), [9, 5, 10, 9], [14, 19]),
    (FLAP(), [36, 3.2, 0, 0], [(36**2 + 3.2**2) / 2, 0]),
    (FLAPVariance(), [4, 0.64, 0, 0], [(16 + 0.64**2) / 2, 0]),
    (FLAPNorm(), [6, 3, 7, 2], [(36 + 9) / 2, (49 + 4) / 2]),
    (Minitron(), [1.5, 0.5, 7, 0.5], [1.25**0.5, (49.25 / 2) ** 0.5]),
    (Channel(), [4.5, 5**0.5 / 2, 7, 2**0.5], [((20.25 + 1.25) / 2) ** 0.5, ((49 + 2) / 2) ** 0.5]),
    (SafetyPotential(), [3, 0, 7, 0], [3, 7]),
    (Olica(), [6, 5**0.5, 7 + 6, 2**0.5 + 2], [6 + 5**0.5, 7 + 6 + 2**0.5 + 2]),
    (Score(scope="coupled"), [6, 3, 7 + 6, 2 + 2], [9, 9 + 8]),
    (Score(reduce="mean"), [6, 3, 7, 2], [4.5, 4.5]),
    (Score(reduce="max"), [6, 3, 7, 2], [6, 7]),
    (Score(weight_norm=2, weight_power=1, activation_power=0.5), [3 * 2**0.5, 5**0.5, 7**0.5, 2], []),
]


@pytest.mark.parametrize(("pruner", "columns", "pairs"), CASES, ids=str)
def test_scores_by_hand(pruner: Score, columns: list[float], pairs: list[float]) -> None:
    assert pruner.scores(HAND).tolist() == pytest.approx(columns, rel=1e-6, abs=1e-12)
    if pairs:
        even = replace(PAIRS, producers=(replace(HAND.producers[0]),))
        assert pruner.scores(even).tolist() == pytest.approx(pairs, rel=1e-6, abs=1e-12)


def test_every_paper_asks_for_what_it_uses() -> None:
    needs = {type(pruner).__name__: set(pruner.needs) for pruner, _, _ in CASES[:10]}
    assert needs == {
        "Wanda": {"gram"},
        "FASP": {"gram"},
        "Magnitude": {"producers"},
        "FLAP": {"variance"},
        "FLAPVariance": {"variance"},
        "FLAPNorm": {"gram"},
        "Minitron": {"absolute"},
        "Channel": {"absolute"},
        "SafetyPotential": {"gram", "contrast"},
        "Olica": {"gram", "producers", "power"},
    }
    assert Magnitude(refit=True).needs == {"producers", "gram"}
    assert Score(scope="coupled").needs == {"gram", "producers", "power"}


@pytest.mark.parametrize("size", [1, 3])
def test_wanda_and_magnitude_are_to_the_bit_what_their_formulas_say(size: int) -> None:
    layer = toy_layer(24, size, 7)
    norm = layer.gram.diagonal().double().clamp_min(0).sqrt()
    assert torch.equal(Wanda().scores(layer), layer.group_sum(layer.weight.double().abs() * norm))
    fed = [f.weight.double().square().sum(1).reshape(layer.n_groups, -1).sum(1) for f in layer.producers]
    own = layer.group_sum(layer.weight.double().square())
    assert torch.equal(Magnitude().scores(layer), own + (fed[0] + fed[1]))


def test_wanda_squared_is_the_exact_error_of_zeroing_one_weight() -> None:
    layer = toy_layer(6, dtype=torch.float64, moments=torch.float64)
    power = float(((layer.weight @ layer.gram) * layer.weight).sum())
    score = layer.weight.abs() * layer.gram.diagonal().sqrt()
    for i, j in ((0, 0), (2, 5), (4, 3)):
        weight = layer.weight.clone()
        weight[i, j] = 0
        assert layer.error(weight) * power == pytest.approx(float(score[i, j] ** 2), rel=1e-9)


def test_flap_is_the_exact_error_of_removing_a_column_whose_mean_goes_into_the_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double() + 1
    weight = torch.randn(4, 6, generator=generator).double()
    layer = LayerProblem(weight, x.T @ x / 50, statistics={"variance": x.var(0, correction=0)})
    score = FLAP().scores(layer)
    for j in range(6):
        lost = (x[:, j, None] - x[:, j].mean()) * weight[:, j]
        assert float(score[j]) == pytest.approx(float(lost.square().sum(1).mean()), rel=1e-12)


def test_channels_are_standardised_before_they_become_heads() -> None:
    """The released code of FLAP, line by line, on two layers of heads and two of neurons."""
    for size, seed in ((1, 0), (1, 1), (4, 2), (4, 3)):
        layer = toy_layer(6, size, seed=seed)
        metric = layer.require("variance").double() * layer.weight.double().square().sum(0)  # WIFV
        metric = metric**2 if size > 1 else metric
        by_hand = (metric - metric.mean()) / metric.std()
        score = FLAP(standardise="channels").scores(layer)
        torch.testing.assert_close(score, by_hand.reshape(-1, size).mean(1), rtol=1e-9, atol=1e-12)
        assert torch.equal(score.argsort(), FLAP().scores(layer).argsort())


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "rms"])
def test_standing_does_not_change_with_the_unit_of_a_layer_nor_the_order_in_it(reduce: Any) -> None:
    layer = toy_layer(8, 3, seed=5)
    pruner = Score(reduce=reduce, standardise="channels")
    score = pruner.scores(layer)
    scaled = replace(layer, weight=1000 * layer.weight)
    torch.testing.assert_close(pruner.scores(scaled), score)
    assert torch.equal(score.argsort(), Score(reduce=reduce).scores(layer).argsort())


def test_heads_of_standardised_channels_crowd_where_standardised_heads_do_not() -> None:
    layer = toy_layer(16, 8)
    spread = FLAP(standardise="channels").scores(layer).std()
    assert spread < 0.6  # of standardised heads it is 1
    assert not FLAP(standardise="channels").scores(replace(layer, weight=0 * layer.weight)).any()


def test_what_cannot_be_standardised_is_refused() -> None:
    with pytest.raises(ValueError, match="needs scope columns"):
        Magnitude(standardise="channels")


def test_inputs_that_the_second_data_set_drives_harder_count_nothing() -> None:
    assert SafetyPotential().scores(with_statistics(HAND, contrast=2 * GRAM.diagonal())).tolist() == [0, 0, 0, 0]
    nothing = with_statistics(HAND, contrast=torch.zeros(4))
    assert torch.equal(SafetyPotential().scores(nothing), Wanda().scores(HAND))


def test_olicas_weakest_share_goes_last_and_its_weights_stay() -> None:
    """Of 200 neurons the released code passes over the 2 of lowest score and removes those that follow."""
    layer = toy_layer(200, d_out=3)
    power = [producer.require("power").double() for producer in layer.producers]
    rows = [f.weight.double() * p.sqrt() for f, p in zip(layer.producers, power, strict=True)]
    column = (layer.weight.double() * layer.gram.diagonal().double().sqrt()).norm(dim=0)
    score = column + sum(row.norm(dim=1) for row in rows)
    order = score.argsort(stable=True).tolist()
    for keep in (200, 120, 50):
        (found,) = Olica().prune(layer, [keep])
        assert found.kept == tuple(sorted(order[:2] + order[202 - keep :]))
        assert torch.equal(found.weight, layer.masked(found.kept or ()).weight)
    assert Olica().prune(layer, [1])[0].kept == (order[1],)
    assert Olica(spared=0).prune(layer, [50])[0].kept == tuple(sorted(order[150:]))
    with pytest.raises(ValueError, match="a share of the groups is spared, from 0 to below 1, not 1"):
        Olica(spared=1)


@pytest.mark.parametrize("pruner", [Wanda(), Magnitude(), Minitron()], ids=repr)
def test_counts_are_exact_on_ties_and_the_lower_id_stays(pruner: Score) -> None:
    layer = LayerProblem(torch.ones(2, 5), torch.eye(5), statistics={"absolute": torch.ones(5)})
    assert [c.kept for c in pruner.prune(layer, range(6))] == [tuple(range(k)) for k in range(6)]


@pytest.mark.parametrize("pruner", [Wanda(), Magnitude(), FLAP(), Channel()], ids=repr)
def test_refit_changes_the_weights_not_the_groups(pruner: Score) -> None:
    layer = toy_layer(8)
    for plain, fitted in zip(
        pruner.prune(layer, [2, 5]), replace(pruner, refit=True).prune(layer, [2, 5]), strict=True
    ):
        assert plain.kept == fitted.kept
        torch.testing.assert_close(fitted.weight, layer.refitted(plain.kept or ()).weight)
        assert layer.error(fitted.weight) < layer.error(plain.weight)


SINGLE = replace(HAND, form=WEIGHTS, producers=())
CELLS: list[tuple[Score, list[list[float]]]] = [
    (Magnitude(), [[9, 1, 0, 4], [0, 4, 1, 4]]),
    (Wanda(), [[6, 1, 0, 1], [0, 2, 7, 1]]),
    (ACE(), [[6, 0.8, 0, 0], [0, 1.6, 0, 0]]),
    (SafetyPotential(), [[3, 0, 0, 0], [0, 0, 7, 0]]),
    (FLAP(), [[36, 0.64, 0, 0], [0, 2.56, 0, 0]]),
    (ACECombined(), [[3 * (2 / 0.7 + 1.6), 0.8 / 0.7 + 1.2, 0, 0.8], [0, 2 * 0.8 / 0.7 + 2.4, 0.8, 0.8]]),
    (Score(weight_power=2, activation_power=0.5), [[9 * 2**0.5, 1, 0, 2 * 2**0.5], [0, 4, 7**0.5, 2 * 2**0.5]]),
]


@pytest.mark.parametrize(("pruner", "cells"), CELLS, ids=str)
def test_single_weights_score_by_hand(pruner: Score, cells: list[list[float]]) -> None:
    torch.testing.assert_close(pruner.cells(SINGLE), torch.tensor(cells).double(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("pruner", "block", "kept"),
    [
        (Wanda(), 0, ["11..", ".11."]),
        (Wanda(per="layer"), 0, ["11..", ".11."]),  # of the ones that tie for the last place the lowest column stays
        (Wanda(), 2, ["1..1", ".11."]),
        (Wanda(per="layer"), 2, ["1..1", ".11."]),
        (Magnitude(), 0, ["1..1", ".1.1"]),
        (Magnitude(per="row"), 0, ["1..1", ".1.1"]),
        (SafetyPotential(), 0, ["11..", "1.1."]),
    ],
    ids=str,
)
def test_half_of_the_single_weights_by_hand(pruner: Score, block: int, kept: list[str]) -> None:
    layer = replace(SINGLE, form=Pattern(1, block) if block else WEIGHTS)
    (found,) = pruner.prune(layer, [2])
    mask = torch.tensor([[cell == "1" for cell in row] for row in kept])
    assert found.kept is None
    assert torch.equal(found.weight, WEIGHT * mask)
    (fitted,) = replace(pruner, refit=True).prune(layer, [2])
    torch.testing.assert_close(fitted.weight, layer.refitted_rows(mask).weight)


def test_ace_squared_is_the_exact_error_of_removing_a_weight_whose_mean_goes_into_the_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double() + 1
    weight = torch.randn(4, 6, generator=generator).double()
    variance = {"variance": x.var(0, correction=0)}
    score = ACE().cells(LayerProblem(weight, x.T @ x / 50, statistics=variance, form=WEIGHTS))
    for i, j in ((0, 0), (3, 5)):
        lost = (x[:, j] - x[:, j].mean()) * weight[i, j]
        assert float(score[i, j] ** 2) == pytest.approx(float(lost.square().mean()), rel=1e-12)


def test_ace_cosp_squared_is_twice_the_cosine_lost_with_a_small_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=generator).double(), torch.randn(300, 6, generator=generator).double()
    weight[0, 2] = 1e-3
    y = x @ weight.T
    lost = weight.clone()
    lost[0, 2] = 0
    cosine = torch.nn.functional.cosine_similarity(y, x @ lost.T, dim=1)
    relative = (x.square() / y.square().sum(1, keepdim=True)).mean(0)
    layer = LayerProblem(weight, x.T @ x / 50, statistics={"relative": relative}, form=WEIGHTS)
    assert float(ACEDirection().cells(layer)[0, 2] ** 2) == pytest.approx(float(2 * (1 - cosine).mean()), rel=0.03)
    alike = with_statistics(layer, relative=layer.gram.diagonal() / 9)  # outputs of one size
    for one, two in zip(ACEDirection().prune(alike, range(7)), Wanda().prune(alike, range(7)), strict=True):
        assert torch.equal(one.weight, two.weight)
