import itertools
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from prunekit import LayerProblem
from prunekit.space.forms import WEIGHTS
from prunekit.testing.layers import sparse_layer
from prunekit_strategies.pruners.score import Magnitude, Wanda
from prunekit_strategies.pruners.weight_score import RIA, OptiShear, Shape, Share, ZPruner

WEIGHT = torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 2.0, 1.0, -2.0]])  # rows 6 and 5, columns 3, 3, 1, 4
GRAM = torch.diag(torch.tensor([4.0, 1.0, 49.0, 0.25]))  # rms: 2, 1, 7, 0.5
HAND = LayerProblem(WEIGHT, GRAM, form=WEIGHTS)
ALL: list[Any] = [RIA(), ZPruner(), OptiShear(), OptiShear(weights="exp", weight_share="row", inputs="log")]


def test_ria_by_hand() -> None:
    relative = [[3 / 3 + 3 / 6, 1 / 3 + 1 / 6, 0, 2 / 4 + 2 / 6], [0, 2 / 3 + 2 / 5, 1 + 1 / 5, 2 / 4 + 2 / 5]]
    expected = torch.tensor(relative).double() * torch.tensor([2, 1, 7, 0.5]).double().sqrt()
    torch.testing.assert_close(RIA().cells(HAND), expected, rtol=1e-6, atol=1e-12)


def test_z_pruner_by_hand() -> None:
    w = WEIGHT.double()
    rows, columns = torch.zeros_like(w), torch.zeros_like(w)
    for i, j in itertools.product(range(2), range(4)):
        rows[i, j] = w[i, j] / sum(float(w[i, k]) ** 2 for k in range(4)) ** 0.5
        columns[i, j] = w[i, j] / sum(float(w[k, j]) ** 2 for k in range(2)) ** 0.5
    zr, zc = ((m - m.mean()) / m.std(correction=0) for m in (rows, columns))
    alpha = 0.7 * (1 - 0.3 * 2 / 8)  # the two zeros are below 0.1 · 11 / 8
    expected = (alpha * zr.abs() ** 3 + (1 - alpha) * zc.abs() ** 3) * torch.tensor([2, 1, 7, 0.5]).double() ** 1.5
    torch.testing.assert_close(ZPruner().cells(HAND), expected, rtol=1e-6, atol=1e-12)


def test_optishear_by_hand() -> None:
    u, v = WEIGHT.double().abs() / (11 / 8), torch.tensor([2, 1, 7, 0.5]).double() / 2.625
    pruner = OptiShear("square", "row+column", "sqrt", "sum")
    expected = u**2 / (u.sum(0) + u.sum(1, keepdim=True)) * v.sqrt() / v.sum()
    torch.testing.assert_close(pruner.cells(HAND), expected)


@pytest.mark.parametrize("per", ["row", "layer"])
def test_optishear_begins_as_wanda_and_holds_magnitude(per: Any) -> None:
    problem = sparse_layer()
    for ours, known in ((OptiShear(per=per), Wanda(per=per)), (OptiShear(inputs="one", per=per), Magnitude(per=per))):
        for one, two in zip(ours.prune(problem, range(13)), known.prune(problem, range(13)), strict=True):
            assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize(("function", "share"), list(itertools.product(get_args(Shape), get_args(Share))))
@pytest.mark.parametrize("quirk", ["plain", "loud", "zero weight", "silent"])
def test_every_metric_is_a_number_and_does_not_depend_on_units(function: Any, share: Any, quirk: Any) -> None:
    other = "identity" if function == "one" else function
    for pruner in (OptiShear(function, share, other, "one"), OptiShear(other, "one", function, share)):
        problem = sparse_layer(quirk=quirk)
        score = pruner.cells(problem)
        assert bool(torch.isfinite(score).all())
        assert float(score.min()) >= 0
        louder = replace(problem, weight=64 * problem.weight, gram=16 * problem.gram)
        ratio = pruner.cells(louder)[score > 0] / score[score > 0]
        if len(ratio):
            torch.testing.assert_close(ratio, ratio[0].expand(len(ratio)))


@pytest.mark.parametrize("pruner", ALL, ids=str)
def test_scores_move_with_rows_and_columns(pruner: Any) -> None:
    problem, score = sparse_layer(), pruner.cells(sparse_layer())
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randperm(7, generator=generator), torch.randperm(12, generator=generator)
    moved = replace(problem, weight=problem.weight[rows][:, columns], gram=problem.gram[columns][:, columns])
    torch.testing.assert_close(pruner.cells(moved), score[rows][:, columns])


@pytest.mark.parametrize("pruner", [RIA(), ZPruner()], ids=str)
def test_louder_weights_score_alike(pruner: Any) -> None:
    problem = sparse_layer()
    louder = replace(problem, weight=-3 * problem.weight)
    torch.testing.assert_close(pruner.cells(louder), pruner.cells(problem))


def test_where_all_rows_are_alike_z_pruner_looks_at_columns_only() -> None:
    same = replace(HAND, weight=torch.ones(2, 4))
    assert not ZPruner().cells(same).any()
    assert [int((c.weight != 0).sum()) for c in ZPruner().prune(same, range(5))] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("pruner", ALL, ids=str)
def test_counts_are_exact_on_ties_the_lower_column_stays_and_refit_keeps_the_mask(pruner: Any) -> None:
    tied = LayerProblem(torch.ones(3, 4), torch.eye(4), form=WEIGHTS)
    for keep, found in enumerate(pruner.prune(tied, range(5))):
        assert torch.equal(found.weight, (torch.arange(4) < keep).expand(3, 4).float())
    problem = sparse_layer()
    for plain, fitted in zip(
        pruner.prune(problem, [3, 8]),
        replace(pruner, refit=True).prune(problem, [3, 8]),
        strict=True,
    ):
        assert torch.equal(fitted.weight, problem.refitted_rows(plain.weight != 0).weight)
        assert problem.error(fitted.weight) < problem.error(plain.weight)
