import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit.testing.layers import QUIRKS, correlated_layer, damped_loss, sparse_layer
from prunekit_strategies.pruners.apt import APT, patterns
from prunekit_strategies.pruners.score import Wanda
from prunekit_strategies.pruners.sparsegpt import SparseGPT


def removed(w: Tensor, v: Tensor, gone: list[int]) -> Tensor:
    """(2) of one row, as it stands."""
    return w - torch.linalg.solve(v[gone][:, gone], w[gone]) @ v[gone]


def price(w: Tensor, v: Tensor, gone: tuple[int, ...]) -> float:
    ids = list(gone)
    return float(w[ids] @ torch.linalg.solve(v[ids][:, ids], w[ids])) if ids else 0.0


@pytest.mark.parametrize("keep", [2, 6, 10])
@pytest.mark.parametrize("exact", [1024, 0])
def test_weights_are_the_constrained_least_squares_of_the_mask(keep: int, exact: int) -> None:
    problem = sparse_layer()
    (found,) = APT(exact=exact).prune(problem, [keep])
    root = torch.linalg.cholesky(problem.hessian).T  # ‖root (w* - ŵ)‖² is the loss
    for row, target in zip(found.weight, problem.target, strict=True):
        kept = (row != 0).nonzero().flatten()
        assert len(kept) == keep
        solution = torch.linalg.lstsq(root[:, kept], root @ target).solution
        torch.testing.assert_close(row[kept], solution, rtol=1e-7, atol=1e-8)


def test_loss_and_weights_are_those_of_the_equations() -> None:
    problem = sparse_layer()
    v = torch.linalg.inv(problem.hessian)
    (found,) = APT().prune(problem, [5])
    total = 0.0
    for row, w in zip(found.weight, problem.target, strict=True):
        gone = (row == 0).nonzero().flatten().tolist()
        torch.testing.assert_close(row, removed(w, v, gone), rtol=1e-8, atol=1e-10)
        total += price(w, v, tuple(gone))
    assert damped_loss(problem, found.weight) == pytest.approx(total, rel=1e-9)


def test_masks_block_by_block_see_what_all_earlier_blocks_removed() -> None:
    problem = sparse_layer()
    v = torch.linalg.inv(problem.hessian)
    (found,) = APT(width=4).prune(problem, [6])
    for row, target in zip(found.weight, problem.target, strict=True):
        w, gone = target, []
        for start in (0, 4, 8):
            here = torch.arange(start, start + 4)
            gone += (start + (w[here] ** 2 / v.diagonal()[here]).argsort()[:2]).tolist()
            w = removed(target, v, gone)
        torch.testing.assert_close(row, w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("block", "keep"), [(2, 1), (4, 2), (4, 1), (6, 3)])
def test_patterns_are_the_best_of_all(block: int, keep: int) -> None:
    problem = sparse_layer(12, block=block)
    v = torch.linalg.inv(problem.hessian)
    mask = patterns(problem.target, v, block, keep)
    for w, kept in zip(problem.target, mask, strict=True):
        for start in range(0, 12, block):
            columns = range(start, start + block)
            gone = tuple(j for j in columns if not kept[j])
            least = min(price(w, v, p) for p in itertools.combinations(columns, block - keep))
            assert price(w, v, gone) == pytest.approx(least, rel=1e-9)


def test_of_equal_patterns_the_lower_columns_stay() -> None:
    mask = patterns(torch.ones(3, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64), 4, 2)
    assert mask.tolist() == [[True, True, False, False] * 2] * 3


@pytest.mark.parametrize("block", [0, 4])
def test_ss_is_sparsegpt_row_by_row(block: int) -> None:
    problem = sparse_layer(block=block)
    ours = APT(variant="SS", width=4).prune(problem, [3, 6])
    theirs = SparseGPT(per="row", width=4).prune(problem, [3, 6])
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.weight, two.weight)


@settings(max_examples=40)
@given(
    blocks=st.integers(1, 3),
    d_out=st.integers(1, 6),
    quirk=st.sampled_from(QUIRKS),
    seed=st.integers(0, 2**31),
    n=st.integers(0, 4),
)
def test_under_one_mask_m_is_never_worse_than_s(blocks: int, d_out: int, quirk: str, seed: int, n: int) -> None:
    problem = sparse_layer(4 * blocks, d_out, 4, quirk=quirk, seed=seed)
    for mask in (Wanda(), SparseGPT(), APT()):
        (m,), (s,) = (APT(variant=v, mask=mask).prune(problem, [n * blocks]) for v in ("MM", "MS"))  # type: ignore[arg-type]
        nothing = damped_loss(problem, torch.zeros_like(problem.weight))
        assert damped_loss(problem, m.weight) <= damped_loss(problem, s.weight) * (1 + 1e-8) + 1e-9 * nothing


@pytest.mark.parametrize("n", [2, 4, 6])
def test_with_one_pattern_per_row_mm_is_the_best_of_all_masks(n: int) -> None:
    problem = sparse_layer(8, 5, 8)
    v = torch.linalg.inv(problem.hessian)
    (found,) = APT().prune(problem, [n])
    least = sum(min(price(w, v, p) for p in itertools.combinations(range(8), 8 - n)) for w in problem.target)
    assert damped_loss(problem, found.weight) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("block", [0, 4])
def test_moving_every_weight_helps(block: int) -> None:
    problems = [correlated_layer(seed, block) for seed in range(4)]
    total = {
        variant: sum(p.error(APT(variant=variant).prune(p, [48])[0].weight) for p in problems)  # type: ignore[arg-type]
        for variant in ("SS", "SM", "MS", "MM")
    }
    assert total["SM"] < 0.8 * total["SS"]
    assert total["MM"] < 0.8 * total["MS"]
