"""Best weights under a mask, three roads to them, and what each promises; float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prunekit import LayerProblem, PluginError
from prunekit.testing.layers import QUIRKS, Quirk, damped_loss, sparse_layer
from prunekit_strategies.pruners.compensation import aimed, best, conjugate, factor, swept
from prunekit_strategies.pruners.compensation import given as masks_of
from prunekit_strategies.pruners.gradient import Gradient
from prunekit_strategies.pruners.score import Wanda


def draw(layer: LayerProblem, share: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed)) < share


def sweep(layer: LayerProblem, mask: Tensor, width: int = 128) -> Tensor:
    weight, _ = swept(layer.target, factor(layer), lambda here, *_: mask[:, here], step=width, width=width)
    return weight


def obs_by_hand(layer: LayerProblem, mask: Tensor) -> Tensor:
    """Row by row, column by column: the OBS update on the columns that are still to come."""
    found = layer.target.clone()
    for row, kept in zip(found, mask, strict=True):
        for j in range(layer.d_in):
            if not kept[j]:
                inverse = torch.linalg.inv(layer.hessian[j:, j:])
                row[j:] -= row[j].item() / inverse[0, 0] * inverse[0]
                row[j] = 0
    return found


@pytest.mark.parametrize("quirk", QUIRKS)
def test_the_factor_is_upper_and_its_square_the_inverse(quirk: Quirk) -> None:
    layer = sparse_layer(quirk=quirk)
    u = factor(layer)
    assert torch.equal(u, u.triu())
    identity = u @ layer.hessian @ u.T
    torch.testing.assert_close(identity, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-8)
    for j in (0, 5, 11):  # U_jj² is the inverse's corner for the columns from j on
        corner = torch.linalg.inv(layer.hessian[j:, j:])[0, 0]
        assert float(u[j, j] ** 2) == pytest.approx(float(corner), rel=1e-8)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_sweep_is_obs_row_by_row(share: float) -> None:
    layer = sparse_layer()
    mask = draw(layer, share)
    torch.testing.assert_close(sweep(layer, mask), obs_by_hand(layer, mask), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("width", [1, 5, 12, 128])
def test_the_width_of_a_block_changes_nothing_under_a_given_mask(width: int) -> None:
    layer = sparse_layer()
    mask = draw(layer)
    torch.testing.assert_close(sweep(layer, mask, width), sweep(layer, mask, 3), rtol=1e-9, atol=1e-11)


def test_a_sweep_pays_for_removed_weights_only() -> None:
    layer = sparse_layer()
    mask = draw(layer)
    u = factor(layer)
    paid = torch.linalg.solve(u.T, (layer.target - sweep(layer, mask)).T).T  # e of every column
    assert float(paid[mask].abs().max()) < 1e-9
    assert float(paid.square().sum()) == pytest.approx(damped_loss(layer, sweep(layer, mask)), rel=1e-9)


@settings(max_examples=100)
@given(
    d_in=st.integers(1, 12),
    d_out=st.integers(1, 6),
    quirk=st.sampled_from(QUIRKS),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    damping=st.sampled_from([1e-4, 0.01, 1.0]),
)
def test_solving_for_all_that_stays_is_never_worse_than_the_sweep(
    *, d_in: int, d_out: int, quirk: Quirk, share: float, seed: int, damping: float
) -> None:
    layer = replace(sparse_layer(d_in, d_out, seed=seed, quirk=quirk), damping=damping)
    mask = draw(layer, share, seed)
    solved, one_way = damped_loss(layer, layer.refitted_rows(mask).weight), damped_loss(layer, sweep(layer, mask))
    assert solved <= one_way * (1 + 1e-8) + 1e-9 * damped_loss(layer, torch.zeros_like(layer.weight))


def test_the_two_are_one_where_what_goes_stands_in_front() -> None:
    layer = sparse_layer()
    mask = torch.arange(12) >= torch.arange(7)[:, None]  # row i loses its first i
    torch.testing.assert_close(sweep(layer, mask), layer.refitted_rows(mask).weight, rtol=1e-8, atol=1e-10)
    behind = mask.flip(1)  # and nothing can make up for the last ones
    torch.testing.assert_close(sweep(layer, behind), layer.sparse(behind).weight, rtol=1e-8, atol=1e-10)
    assert damped_loss(layer, layer.refitted_rows(behind).weight) < 0.9 * damped_loss(layer, sweep(layer, behind))


@pytest.mark.parametrize("quirk", QUIRKS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_conjugate_gradients_end_at_the_least_squares(quirk: Quirk, share: float) -> None:
    layer = sparse_layer(quirk=quirk)
    mask = draw(layer, share)
    found = conjugate(layer.hessian, layer.target, mask)
    assert not found[~mask].any()
    torch.testing.assert_close(found, layer.refitted_rows(mask).weight, rtol=1e-6, atol=1e-7)


def test_conjugate_gradients_end_there_from_anywhere_and_every_step_helps() -> None:
    layer = sparse_layer()
    mask = draw(layer)
    start = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)).double()
    steps = [conjugate(layer.hessian, layer.target, mask, steps=n, start=start) for n in (0, 1, 2, 4, 8, 40)]
    losses = [damped_loss(layer, weight) for weight in steps]
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(steps[0], torch.where(mask, start, 0))
    torch.testing.assert_close(steps[-1], layer.refitted_rows(mask).weight, rtol=1e-7, atol=1e-8)


def test_rows_that_keep_all_or_nothing_need_no_gradients() -> None:
    layer = sparse_layer()
    mask = draw(layer)
    mask[0], mask[1] = True, False
    found = conjugate(layer.hessian, layer.target, mask)
    torch.testing.assert_close(found[0], layer.target[0], rtol=0, atol=0)
    assert not found[1].any()


def test_wide_layers_are_solved_by_gradients_and_a_full_mask_by_nothing() -> None:
    layer = sparse_layer()
    mask = draw(layer)
    torch.testing.assert_close(
        best(layer, mask, exact=11, steps=100).weight, best(layer, mask, exact=12, steps=1).weight, rtol=1e-6, atol=1e-7
    )
    assert torch.equal(best(layer, torch.ones_like(mask), exact=0, steps=1).weight, layer.weight)


def test_another_pruner_is_shown_what_it_needs_and_no_more() -> None:
    layer = sparse_layer()
    (wanda,) = masks_of(layer, Wanda(), [5])
    assert torch.equal(wanda, Wanda().prune(layer, [5])[0].weight != 0)
    masks_of(layer, Gradient(), [5])
    with pytest.raises(PluginError, match="no statistic 'gradient'"):
        masks_of(replace(layer, statistics={}), Gradient(), [5])


def test_an_aim_hides_what_it_does_not_ask_for() -> None:
    layer = replace(sparse_layer(), energy=1.0)
    layer = replace(layer, cross=2 * layer.weight @ layer.gram, drift=layer.weight)
    assert aimed(layer, "own").cross is None
    assert aimed(layer, "dense").drift is None
    assert aimed(layer, "stream") is layer
    assert torch.equal(aimed(layer, "own").target, layer.weight)
