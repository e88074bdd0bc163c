"""Single weights: exact masks, and the least squares of every row on its own support, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit import LayerProblem, best_weights
from prunekit.layer import problem
from prunekit.layer.candidates import is_sparse
from prunekit.testing import toy_layer
from prunekit.testing.layers import QUIRKS, sparse_layer


def draw(d_out: int, d_in: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(seed)) < share


def by_hand(layer: LayerProblem, mask: Tensor) -> Tensor:
    fitted = torch.zeros_like(layer.target)
    for row, kept in enumerate(mask):
        ids = kept.nonzero().flatten()
        reached = (layer.target[row] @ layer.hessian)[ids]
        fitted[row, ids] = torch.linalg.solve(layer.hessian[ids][:, ids], reached)
    return fitted


def test_sparse_is_the_weight_under_the_mask() -> None:
    layer, mask = sparse_layer(), draw(7, 12, 0.5)
    candidate = layer.sparse(mask)
    assert candidate.kept is None
    assert torch.equal(candidate.weight, layer.weight * mask)
    assert torch.equal(layer.sparse(torch.ones_like(mask)).weight, layer.weight)


@pytest.mark.parametrize("cells", [2**24, 100, 1])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_every_row_is_the_least_squares_on_its_own_support(
    share: float, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "CELLS_AT_ONCE", cells)
    layer, mask = sparse_layer(), draw(7, 12, share)
    candidate = layer.refitted_rows(mask)
    assert candidate.kept is None
    assert not candidate.weight[~mask].any()
    torch.testing.assert_close(candidate.weight, by_hand(layer, mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("quirk", QUIRKS)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_rows_satisfy_their_normal_equations_on_awkward_inputs(quirk: str, share: float) -> None:
    layer, mask = sparse_layer(quirk=quirk), draw(7, 12, share)
    slope = (layer.refitted_rows(mask).weight - layer.target) @ layer.hessian
    scale = float((layer.target @ layer.hessian).abs().max())
    assert float(slope[mask].abs().max()) < 1e-8 * scale


def test_on_one_support_for_all_rows_it_is_the_refit_of_the_groups() -> None:
    layer, kept = sparse_layer(), [0, 3, 4, 9]
    mask = torch.zeros(7, 12, dtype=torch.bool).index_fill(1, torch.tensor(kept), True)
    torch.testing.assert_close(layer.refitted_rows(mask).weight, layer.refitted(kept).weight)


def test_its_loss_is_that_of_the_removed_weights() -> None:
    layer, mask = sparse_layer(), draw(7, 12, 0.6)
    lost = layer.target - layer.refitted_rows(mask).weight
    inverse = torch.linalg.inv(layer.hessian)
    loss = 0.0
    for w, gone in zip(layer.target, (~mask), strict=True):
        loss += float(w[gone] @ torch.linalg.solve(inverse[gone][:, gone], w[gone]))
    assert float(((lost @ layer.hessian) * lost).sum()) == pytest.approx(loss, rel=1e-9)


def test_all_of_a_row_is_its_best_weight_and_none_of_it_zero() -> None:
    layer = sparse_layer()
    seen = layer.gram + 0.1 * torch.eye(12)
    moved = replace(layer, gram=seen, cross=layer.weight @ layer.gram, energy=1.0)
    everything = torch.ones(7, 12, dtype=torch.bool)
    assert torch.equal(layer.refitted_rows(everything).weight, layer.weight)
    assert torch.equal(moved.refitted_rows(everything).weight, moved.target)
    assert not layer.refitted_rows(~everything).weight.any()


def test_half_precision_weights_stay_so() -> None:
    layer = toy_layer(8, dtype=torch.bfloat16)
    mask = draw(5, 8, 0.5)
    assert layer.sparse(mask).weight.dtype == layer.refitted_rows(mask).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("per", ["row", "layer"])
def test_when_all_scores_are_one_the_first_columns_stay(per: str) -> None:
    for keep, mask in enumerate(best_weights(torch.ones(3, 5), range(6), per)):  # type: ignore[arg-type]
        assert torch.equal(mask, torch.arange(5).expand(3, 5) < keep)


def test_sparse_is_the_count_on_average_or_in_every_block() -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert [is_sparse(weight, keep) for keep in (1, 2)] == [False, True]
    assert [is_sparse(weight, keep, m=2) for keep in (2, 4)] == [False, True]
    assert is_sparse(torch.eye(4), 2, m=2)


def test_per_row_and_per_layer_by_hand() -> None:
    score = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 5.0, 1.0, 2.0]])
    (row,), (layer,) = best_weights(score, [2]), best_weights(score, [2], "layer")
    assert row.tolist() == [[True, True, False, False], [False, True, False, True]]
    assert layer.tolist() == [[True] * 4, [False] * 4]
    (blocks,) = best_weights(score, [2], m=2)
    assert blocks.tolist() == [[True, False, True, False], [False, True, False, True]]


@settings(max_examples=60)
@given(
    d_out=st.integers(1, 6),
    blocks=st.integers(1, 4),
    block=st.integers(1, 8),
    levels=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_counts_are_exact_and_masks_nest_whatever_ties(
    d_out: int, blocks: int, block: int, levels: int, seed: int
) -> None:
    d_in = blocks * block
    score = torch.randint(levels, (d_out, d_in), generator=torch.Generator().manual_seed(seed)).double()
    keeps = range(d_in + 1)
    rows, layers = best_weights(score, keeps), best_weights(score, keeps, "layer")
    patterns = best_weights(score, [n * blocks for n in range(block + 1)], m=block)
    assert all(bool((mask.sum(1) == keep).all()) for keep, mask in zip(keeps, rows, strict=True))
    assert [int(mask.sum()) for mask in layers] == [keep * d_out for keep in keeps]
    for mask in layers[1:-1]:
        assert float(score[~mask].max()) <= float(score[mask].min())
    for mask in rows[1:-1]:
        stays, goes = torch.where(mask, score, torch.inf).amin(1), torch.where(mask, -torch.inf, score).amax(1)
        assert bool((goes <= stays).all())
    for n, mask in enumerate(patterns):
        assert bool((mask.unflatten(1, (blocks, block)).sum(2) == n).all())
    for masks in (rows, layers, patterns):
        for fewer, more in itertools.pairwise(masks):
            assert not bool((fewer & ~more).any())


def test_the_order_asked_is_the_order_given() -> None:
    score = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    up, down = best_weights(score, range(7)), best_weights(score, range(6, -1, -1))
    assert all(torch.equal(one, two) for one, two in zip(up, reversed(down), strict=True))


@pytest.mark.parametrize(
    ("keeps", "options", "sentence"),
    [
        ([3], {"m": 4}, r"\[3\] of 8 weights are not whole numbers in every 4"),
        ([4], {"m": 3}, "not whole numbers"),
        ([4], {"per": "column"}, "no per 'column'; there are row, layer"),
    ],
)
def test_what_does_not_fit_is_refused(keeps: list[int], options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        best_weights(torch.ones(2, 8), keeps, **options)  # type: ignore[arg-type]


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight \[1, 2\] is not"):
        best_weights(torch.ones(2, 8).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(float("nan"))), [4])
