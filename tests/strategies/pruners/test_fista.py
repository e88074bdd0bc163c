from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem, LocalPruner
from prunekit.testing.layers import damped_loss, sparse_layer
from prunekit_strategies.pruners.alps import ALPS
from prunekit_strategies.pruners.apt import APT
from prunekit_strategies.pruners.fista import FISTA, lasso
from prunekit_strategies.pruners.score import Magnitude, Wanda
from prunekit_strategies.pruners.sparsegpt import SparseGPT

STARTS: list[LocalPruner] = [Wanda(), Magnitude(per="row"), SparseGPT(), APT(), ALPS()]


def solved(problem: LayerProblem, penalty: float, rounds: int = 5000) -> Tensor:
    largest = float(torch.linalg.eigvalsh(problem.hessian)[-1])
    return lasso(problem.hessian, problem.target, torch.zeros_like(problem.target), penalty, largest, rounds)


def test_the_lasso_meets_its_conditions() -> None:
    problem = replace(sparse_layer(), damping=0.1)
    penalty = 0.2 * float((problem.target @ problem.hessian).abs().max())
    found = solved(problem, penalty)
    slope = (found - problem.target) @ problem.hessian
    there = found != 0
    assert 0.2 < float(there.double().mean()) < 0.9
    torch.testing.assert_close(slope[there], -penalty * found[there].sign(), rtol=1e-6, atol=1e-8)
    assert float(slope[~there].abs().max()) <= penalty * (1 + 1e-9)


def test_without_penalty_it_is_the_best_weight_and_with_the_largest_nothing() -> None:
    problem = replace(sparse_layer(), damping=0.1)
    torch.testing.assert_close(solved(problem, 0.0), problem.target, rtol=1e-6, atol=1e-7)
    most = float((problem.target @ problem.hessian).abs().max())
    assert not solved(problem, 1.0001 * most).any()
    assert solved(problem, 0.99 * most).any()


@pytest.mark.parametrize(
    "start", [Wanda(), Magnitude(per="row"), SparseGPT(), APT(), ALPS()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("block", [0, 4])
def test_no_answer_is_worse_than_its_start(start: LocalPruner, block: int) -> None:
    for seed in range(4):
        problem = sparse_layer(block=block, seed=seed)
        for keep in (3, 6, 9):
            (before,), (after,) = start.prune(problem, [keep]), FISTA(start=start).prune(problem, [keep])
            assert damped_loss(problem, after.weight) <= damped_loss(problem, before.weight) * (1 + 1e-5)


@pytest.mark.parametrize("block", [0, 4])
def test_it_refines_masks(block: int) -> None:
    problems = [sparse_layer(48, 24, block, seed) for seed in range(4)]

    def total(pruner: LocalPruner) -> float:
        return sum(p.error(pruner.prune(p, [24])[0].weight) for p in problems)

    assert total(FISTA(trials=0, start=Wanda())) == pytest.approx(total(Wanda(refit=True)), rel=1e-9)
    assert total(FISTA(start=Wanda())) < 0.97 * total(Wanda(refit=True))
    assert total(FISTA(start=SparseGPT())) < total(APT(mask=SparseGPT())) < total(SparseGPT())


def test_weights_are_the_least_squares_of_the_support() -> None:
    problem = sparse_layer()
    for exact in (1024, 0):
        for found in FISTA(exact=exact).prune(problem, [3, 6, 9]):
            best = problem.refitted_rows(found.weight != 0).weight
            torch.testing.assert_close(found.weight, best, rtol=1e-6, atol=1e-7)


def test_scaled_it_does_not_depend_on_the_units_of_inputs() -> None:
    problem = replace(sparse_layer(), damping=0.0)
    units = torch.tensor([2.0**j for j in range(-6, 6)], dtype=torch.float64)
    louder = replace(problem, weight=problem.weight / units, gram=problem.gram * units * units[:, None])
    (one,), (two,) = FISTA().prune(problem, [6]), FISTA().prune(louder, [6])
    torch.testing.assert_close(two.weight * units, one.weight, rtol=1e-6, atol=1e-9)
