"""What a row was worth stays: on even inputs, on the mean input, and never more than least squares; float64."""

from dataclasses import replace

import pytest
import torch

from prunekit.testing.layers import QUIRKS, sparse_layer
from prunekit_strategies.pruners.mean_move import MeanMove, moved
from prunekit_strategies.pruners.score import Magnitude, Wanda

F64 = torch.float64


def drawn(seed=0, d_out=5, d_in=12):
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(d_out, d_in, dtype=F64, generator=rng)
    return w, torch.rand(d_out, d_in, generator=rng) < 0.5, torch.randn(d_in, dtype=F64, generator=rng)


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_their_sums_and_their_outputs_on_the_mean_input(seed):
    w, mask, means = drawn(seed)
    even, fitted = moved(w, mask, torch.ones(12, dtype=F64)), moved(w, mask, means)
    torch.testing.assert_close(even.sum(1), w.sum(1))
    torch.testing.assert_close(fitted @ means, w @ means)
    assert not even[~mask].any()
    assert not fitted[~mask].any()


def test_where_all_means_are_equal_both_are_the_rule_by_hand():
    w, mask, _ = drawn()
    by_hand = w.clone()
    for row, kept in zip(by_hand, mask, strict=True):
        row[kept] += row[~kept].sum() / kept.sum()
        row[~kept] = 0
    torch.testing.assert_close(moved(w, mask, torch.ones(12, dtype=F64)), by_hand)
    torch.testing.assert_close(moved(w, mask, torch.full((12,), -3.0, dtype=F64)), by_hand)


def test_a_mean_taken_after_the_removed_are_zero_moves_nothing():
    w, mask, _ = drawn()
    torch.testing.assert_close(moved(torch.where(mask, w, 0), mask, torch.ones(12, dtype=F64)), torch.where(mask, w, 0))


def test_rows_that_keep_nothing_and_means_of_zero_stay():
    w, _, _ = drawn()
    assert not moved(w, torch.zeros_like(w, dtype=torch.bool), torch.ones(12, dtype=F64)).any()
    mask = torch.arange(12).expand(5, 12) < 6
    means = (torch.arange(12) >= 6).to(F64)  # what is kept is zero in the mean
    torch.testing.assert_close(moved(w, mask, means), torch.where(mask, w, 0))


@pytest.mark.parametrize("along", ["even", "inputs"])
@pytest.mark.parametrize("quirk", QUIRKS)
def test_least_squares_on_the_same_mask_is_never_worse(along, quirk):
    layer = sparse_layer(quirk=quirk)
    pruner = MeanMove(mask=Wanda(), along=along)
    for candidate, masked in zip(pruner.prune(layer, [3, 8]), Wanda().prune(layer, [3, 8]), strict=True):
        best = layer.refitted_rows(masked.weight != 0)
        assert layer.error(best.weight) <= layer.error(candidate.weight) * (1 + 1e-6) + 1e-9


def test_on_inputs_that_never_change_the_mean_is_all_there_is():
    layer = sparse_layer()
    x = torch.linspace(0.5, 2, layer.d_in, dtype=F64)
    constant = replace(layer, gram=torch.outer(x, x).to(layer.gram), statistics={"mean": x.to(layer.gram)})
    (masked,) = Magnitude().prune(constant, [6])
    (candidate,) = MeanMove(along="inputs").prune(constant, [6])
    assert constant.error(masked.weight) > 1e-3
    assert constant.error(candidate.weight) < 1e-9


def test_a_pruner_of_groups_makes_no_masks():
    from prunekit_strategies.pruners.second_moment import SecondMoment

    with pytest.raises(ValueError, match="no single weights"):
        MeanMove(mask=SecondMoment())
