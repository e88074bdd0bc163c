import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from prunekit import LayerProblem
from prunekit.layer.problem import Producer
from prunekit.space.forms import WEIGHTS, Pattern
from prunekit.testing import toy_layer, with_statistics
from prunekit_strategies.pruners.gradient import Gradient, HyWIA, LLMPruner

HAND = LayerProblem(
    torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 2.0, 1.0, -2.0]]),
    torch.eye(4),
    statistics={
        "gradient": torch.tensor([[1.0, 2.0, 5.0, 1.0], [1.0, 1.0, -1.0, 0.5]]),  # w g: (3 -2 0 2), (0 2 -1 -1)
        "fisher": torch.tensor([[2.0, 1.0, 9.0, 0.5], [1.0, 1.0, 4.0, 1.0]]),  # w² F: (18 1 0 2), (0 4 4 4)
    },
    producers=(
        Producer(
            "up",
            torch.tensor([[1.0], [1.0], [2.0], [-1.0]]),
            {
                "gradient": torch.tensor([[0.5], [2.0], [-1.0], [-3.0]]),  # w g: 0.5 2 -2 3
                "fisher": torch.tensor([[1.0], [2.0], [1.0], [4.0]]),  # w² F: 1 2 4 4
            },
        ),
    ),
)
CASES: list[tuple[dict[str, Any], list[float], list[float]]] = [  # by column, by pair
    ({}, [3.5, 6, 3, 6], [9.5, 9]),
    ({"order": "second"}, [19, 7, 8, 10], [26, 18]),
    ({"order": "mix"}, [6 + 0, 2.5 + 0 + 1, 3 + 4, 1 + 3 + 1], [6 + 2.5 + 0 + 1, 0 + 3 + 1 + 3 + 4 + 1]),
    ({"grain": "coarse"}, [0.5 + 3, 2 + 0, 2 + 1, 3 + 1], [2.5 + 3, 1 + 0]),  # LLM-Pruner's `vector`
    ({"reduce": "mean"}, [1.75, 3, 1.5, 3], [4.75, 4.5]),
    ({"reduce": "max"}, [3, 4, 2, 3], [7, 5]),
    ({"reduce": "prod"}, [1.5, 8, 2, 9], [2.5 * 7, 5 * 4]),
    ({"reduce": "first"}, [0.5, 2, 2, 3], [2.5, 5]),
]


@pytest.mark.parametrize(("options", "columns", "pairs"), CASES, ids=str)
def test_scores_by_hand(options: dict[str, Any], columns: list[float], pairs: list[float]) -> None:
    pruner = Gradient(**options)
    assert pruner.scores(HAND).tolist() == pytest.approx(columns)
    assert pruner.scores(replace(HAND, group_size=2)).tolist() == pytest.approx(pairs)


def test_grains_mixed_group_by_group_by_hand() -> None:
    fine, coarse = [3.5, 6, 3, 6], [3.5, 2, 3, 4]
    f, c = ([u / (sum(all_) / 4) for u in all_] for all_ in (fine, coarse))
    alpha = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in zip(f, c, strict=True)]
    by_hand = [w * a + (1 - w) * b for w, a, b in zip(alpha, f, c, strict=True)]
    assert HyWIA(order="first", mixing="unit").scores(HAND).tolist() == pytest.approx(by_hand)
    assert all(min(a, b) <= u <= max(a, b) for u, a, b in zip(by_hand, f, c, strict=True))


def z_scores(score: torch.Tensor) -> torch.Tensor:
    return (score - score.mean()) / score.std(correction=0)


def test_attention_between_z_scores_always_weighs_both_grains_alike() -> None:
    """Both have length √n, so the matrix of (4) is symmetric, its rows sum to 1, and so do its columns."""
    for layer in (HAND, *(toy_layer(12, seed=seed) for seed in range(4))):
        fine = Gradient(order="mix").scores(layer)  # Σ |w g - ½ w² F|
        coarse = Gradient(grain="coarse").scores(layer)  # |Σ w g|
        half = (z_scores(fine) + z_scores(coarse)) / 2
        torch.testing.assert_close(HyWIA().scores(layer), half, rtol=0, atol=1e-12)


def test_attention_between_shares_of_the_maximum_does_not() -> None:
    layer = toy_layer(12)
    fine, coarse = Gradient(order="mix").scores(layer), Gradient(grain="coarse").scores(layer)
    z = torch.stack([fine / fine.max(), coarse / coarse.max()])
    e = (z @ z.T / 12**0.5).exp()
    weights = [float(sum(e[row, column] / e[row].sum() for row in range(2)) / 2) for column in range(2)]
    assert sum(weights) == pytest.approx(1)
    assert abs(weights[0] - 0.5) > 0.01
    torch.testing.assert_close(HyWIA(mixing="maxima").scores(layer), weights[0] * z[0] + weights[1] * z[1])


def test_mixed_scores_know_no_unit_and_one_grain_decides_where_the_other_is_even() -> None:
    assert torch.equal(LLMPruner().scores(HAND), Gradient(order="first", grain="fine", reduce="sum").scores(HAND))


def test_the_coarse_first_order_score_is_the_slope_of_the_loss_as_a_group_fades() -> None:
    # the own columns alone: d/ds of L at s = 1, the group scaled by s
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator).double()
    weight = torch.randn(5, 6, generator=generator).double().requires_grad_()
    labels = torch.randint(5, (30,), generator=generator)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(x @ weight.T, labels), weight)
    weight = weight.detach()
    layer = LayerProblem(weight, x.T @ x / 30, group_size=2, statistics={"gradient": gradient})
    scores = Gradient(grain="coarse").scores(layer)
    step = 1e-6
    for g in range(3):
        losses = []
        for s in (1 + step, 1 - step):
            faded = weight.clone()
            faded[:, 2 * g : 2 * g + 2] *= s
            losses.append(float(functional.cross_entropy(x @ faded.T, labels)))
        assert float(scores[g]) == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("grain", ["fine", "coarse", "mixed"])
def test_the_sign_of_the_loss_does_not_matter(order: Any, grain: Any) -> None:
    layer, pruner = toy_layer(8, 3), Gradient(order=order, grain=grain)
    turned = replace(
        with_statistics(layer, gradient=-layer.require("gradient")),
        producers=tuple(
            replace(f, statistics={**f.statistics, "gradient": -f.require("gradient")}) for f in layer.producers
        ),
    )
    assert torch.equal(pruner.scores(layer), pruner.scores(turned))


def test_refit_changes_the_weights_not_the_groups() -> None:
    layer = toy_layer(8)
    for plain, fitted in zip(Gradient().prune(layer, [2, 5]), Gradient(refit=True).prune(layer, [2, 5]), strict=True):
        assert plain.kept == fitted.kept
        torch.testing.assert_close(fitted.weight, layer.refitted(plain.kept or ()).weight)


@pytest.mark.parametrize(
    ("options", "block", "kept"),
    [
        ({}, 0, ["11.1", ".1.."]),  # 3 2 0 2, 0 2 1 1
        ({"per": "row"}, 0, ["11..", ".11."]),
        ({"grain": "coarse", "reduce": "max"}, 2, ["1..1", ".11."]),
        ({"order": "second"}, 0, ["1...", ".111"]),  # 18 1 0 2, 0 4 4 4
        ({"order": "mix", "per": "row"}, 0, ["11..", "..11"]),  # 6 2.5 0 1, 0 0 3 3
    ],
    ids=str,
)
def test_half_of_the_single_weights_by_hand(options: dict[str, Any], block: int, kept: list[str]) -> None:
    layer = replace(HAND, form=Pattern(1, block) if block else WEIGHTS, producers=())
    mask = torch.tensor([[cell == "1" for cell in row] for row in kept])
    (found,) = Gradient(**options).prune(layer, [2])
    assert found.kept is None
    assert torch.equal(found.weight, HAND.weight * mask)
    (fitted,) = Gradient(refit=True, **options).prune(layer, [2])
    torch.testing.assert_close(fitted.weight, layer.refitted_rows(mask).weight)


def test_asks_for_what_it_uses() -> None:
    assert Gradient().needs == {"gradient", "producers"}
    assert Gradient(refit=True).needs == {"gradient", "producers", "gram"}
