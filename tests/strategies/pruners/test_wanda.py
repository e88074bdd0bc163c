from dataclasses import replace

import pytest
import torch

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.magnitude import Magnitude
from prunekit_strategies.pruners.wanda import Wanda

WEIGHT = torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 2.0, 1.0, -2.0]])  # sums of |W_ij|: 3, 3, 1, 4
GRAM = torch.diag(torch.tensor([4.0, 1.0, 49.0, 0.25]))  # norms: 2, 1, 7, 0.5; scores: 6, 3, 7, 2


def test_keeps_the_largest_columns_by_hand() -> None:
    candidates = Wanda().prune(LayerProblem(WEIGHT, GRAM), [3, 1, 2])
    assert [c.kept for c in candidates] == [(0, 1, 2), (2,), (0, 2)]
    assert candidates[2].weight.tolist() == [[3, 0, 0, 0], [0, 0, 1, 0]]


def test_keeps_the_largest_block_by_hand() -> None:
    even, odd = LayerProblem(WEIGHT, GRAM, group_size=2), LayerProblem(-2 * WEIGHT, GRAM, group_size=2)
    assert Wanda().prune(even, [1])[0].kept == (0,)  # a tie, 6 + 3 against 7 + 2: the lower id
    assert Wanda().prune(odd, [1])[0].kept == (0,)
    assert Wanda().prune(replace(even, gram=GRAM + torch.diag(torch.tensor([0, 0, 0, 3.75]))), [1])[0].kept == (1,)


def test_score_squared_is_the_exact_error_of_zeroing_one_weight() -> None:
    layer = toy_layer(6, dtype=torch.float64, moments=torch.float64)
    power = float(((layer.weight @ layer.gram) * layer.weight).sum())
    score = layer.weight.abs() * layer.gram.diagonal().sqrt()
    for i, j in ((0, 0), (2, 5), (4, 3)):
        weight = layer.weight.clone()
        weight[i, j] = 0
        assert layer.error(weight) * power == pytest.approx(float(score[i, j] ** 2), rel=1e-9)


def test_is_magnitude_on_white_inputs_and_weights_of_one_size_per_column() -> None:
    sizes = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0])
    layer = LayerProblem(torch.ones(3, 5) * sizes, torch.eye(5))
    wanda, magnitude = Wanda().prune(layer, range(6)), Magnitude().prune(layer, range(6))
    assert [c.kept for c in wanda] == [c.kept for c in magnitude]


def test_loudness_of_all_inputs_does_not_matter() -> None:
    quiet, loud = LayerProblem(WEIGHT, GRAM), LayerProblem(WEIGHT, 64 * GRAM)
    for one, two in zip(Wanda().prune(quiet, range(5)), Wanda().prune(loud, range(5)), strict=True):
        assert one.kept == two.kept


def test_counts_are_exact_on_ties_and_the_lower_id_stays() -> None:
    candidates = Wanda().prune(LayerProblem(torch.ones(2, 5), torch.eye(5)), range(6))
    assert [c.kept for c in candidates] == [tuple(range(k)) for k in range(6)]


def test_refit_changes_the_weights_not_the_groups() -> None:
    layer = toy_layer(8)
    for plain, fitted in zip(Wanda().prune(layer, [2, 5]), Wanda(refit=True).prune(layer, [2, 5]), strict=True):
        assert plain.kept == fitted.kept
        torch.testing.assert_close(fitted.weight, layer.refitted(plain.kept or ()).weight)
        assert layer.error(fitted.weight) < layer.error(plain.weight)
