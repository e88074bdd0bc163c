from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem, best_weights
from prunekit.testing.layers import sparse_layer
from prunekit_strategies.pruners.alps import ALPS, alternate
from prunekit_strategies.pruners.score import Wanda
from prunekit_strategies.pruners.sparsegpt import SparseGPT


def layer(*shape: int, **options: Any) -> LayerProblem:
    return replace(sparse_layer(*shape, **options), damping=0.1)


def scaled(problem: LayerProblem) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """S, B₀, A and its eigenvalues and -vectors."""
    scale = problem.hessian.diagonal().sqrt()
    gram = problem.hessian / scale / scale[:, None]
    return scale, problem.target * scale, gram, torch.linalg.eigh(gram)


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0, 3.0])
def test_on_a_fixed_support_it_converges_to_the_least_squares(share: float) -> None:
    problem = layer()
    mask = torch.rand(7, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    scale, weight, gram, eigen = scaled(problem)
    rho = share * float(eigen[0][-1])
    fit, sparse, support = alternate(weight, gram, eigen, lambda _: mask, rho, 4000, "constant")
    assert torch.equal(support, mask)
    best = problem.refitted_rows(mask).weight
    torch.testing.assert_close(sparse / scale, best, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(fit / scale, best, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("block", [0, 4])
def test_where_hard_thresholds_settle_is_a_fixed_point_and_optimal_on_its_support(seed: int, block: int) -> None:
    problem = layer(seed=seed, block=block)
    scale, weight, gram, eigen = scaled(problem)

    def choose(x: Tensor) -> Tensor:
        return best_weights(x.abs(), [6], "layer", block)[0]

    rho = 1.5 * float(eigen[0][-1])
    _, sparse, support = alternate(weight, gram, eigen, choose, rho, 4000, "constant")
    torch.testing.assert_close(sparse / scale, problem.refitted_rows(support).weight, rtol=1e-6, atol=1e-7)
    _, again, still = alternate(weight, gram, eigen, choose, rho, 4003, "constant")
    assert torch.equal(support, still)
    torch.testing.assert_close(again, sparse, rtol=1e-7, atol=1e-9)


def test_the_penalty_grows_until_the_support_stands_still() -> None:
    problem = layer(48, 24)
    _, weight, gram, eigen = scaled(problem)
    asked = []

    def choose(x: Tensor) -> Tensor:
        asked.append(best_weights(x.abs(), [16], "layer")[0])
        return asked[-1]

    *_, support = alternate(weight, gram, eigen, choose, 0.1, 300)
    assert 3 < len(asked) - 1 < 300
    assert (len(asked) - 1) % 3 == 0
    assert torch.equal(support, asked[-4])  # three rounds ago
    assert not torch.equal(asked[-4], asked[-7])


def test_the_released_rule_lowers_a_penalty_that_is_too_large_for_anything_to_move() -> None:
    problem = layer(48, 24)
    _, weight, gram, eigen = scaled(problem)
    asked = []

    def choose(x: Tensor) -> Tensor:
        asked.append(best_weights(x.abs(), [8], "layer")[0])
        return asked[-1]

    *_, still = alternate(weight, gram, eigen, choose, 1e4, 300)
    assert len(asked) - 1 == 3
    assert torch.equal(still, asked[0])  # ours grows: it stays with the largest weights
    *_, moved = alternate(weight, gram, eigen, choose, 1e4, 300, "released")
    assert not torch.equal(moved, still)
    lost = [problem.error(problem.refitted_rows(mask).weight) for mask in (moved, still)]
    assert lost[0] < lost[1]


def test_the_released_rule_begins_with_the_largest_weights_where_ours_begins_with_all() -> None:
    problem, rho = layer(), 0.3
    _, weight, gram, eigen = scaled(problem)
    largest = torch.where(best_weights(weight.abs(), [6], "layer")[0], weight, 0)
    ridge = gram + rho * torch.eye(len(gram), dtype=gram.dtype)
    first = torch.linalg.solve(ridge, (weight @ gram + rho * largest).T).T  # (1) from Y = 0

    def fitted(rule: Any) -> Tensor:
        """What the first round of a rule thresholds."""
        asked: list[Tensor] = []

        def choose(x: Tensor) -> Tensor:
            asked.append(x)
            return best_weights(x.abs(), [6], "layer")[0]

        alternate(weight, gram, eigen, choose, rho, 1, rule)
        return asked[1]

    torch.testing.assert_close(fitted("released"), first)
    torch.testing.assert_close(fitted("grow"), weight)


@pytest.mark.parametrize("exact", [1024, 0])
def test_weights_are_the_least_squares_of_the_support(exact: int) -> None:
    problem = layer()
    for found in ALPS(exact=exact).prune(problem, [3, 6, 9]):
        best = problem.refitted_rows(found.weight != 0).weight
        torch.testing.assert_close(found.weight, best, rtol=1e-6, atol=1e-7)


def test_without_rounds_it_keeps_the_largest_scaled_weights_which_are_wanda_s() -> None:
    problem = replace(layer(), damping=0.0)
    (ours,), (wanda,) = ALPS(rounds=0, per="row").prune(problem, [5]), Wanda(refit=True).prune(problem, [5])
    torch.testing.assert_close(ours.weight, wanda.weight)


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("keep", [24, 12])
def test_it_beats_sparsegpt_and_wanda_refitted(block: int, keep: int) -> None:
    problems = [replace(layer(48, 24, block, seed), damping=0.01) for seed in range(4)]
    alps, wanda, sparsegpt = (
        sum(p.error(pruner.prune(p, [keep])[0].weight) for p in problems)
        for pruner in (ALPS(), Wanda(refit=True), SparseGPT())
    )
    assert alps < 0.95 * wanda
    assert alps < 0.8 * sparsegpt
