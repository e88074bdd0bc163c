"""Swaps keep every count, the mean error falls with each, and moments are those of all tokens at once."""

from dataclasses import replace

import pytest
import torch

from prunekit import best_weights
from prunekit.calibration.twin import Twin
from prunekit.testing import toy_supernet, toy_tokens, toy_workpiece
from prunekit_strategies.finishers.dsnot import DSnoT, Spread, swapped

MANY = toy_tokens(windows=12)


def problem(rows=7, columns=16, tokens=200, seed=0, block=0):
    """(dense, masked half of it, what its inputs are): means differ from zero, scales from each other."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=rng, dtype=torch.float64)
    x = x * torch.rand(columns, generator=rng, dtype=torch.float64) + torch.randn(columns, generator=rng).double()
    dense = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    (mask,) = best_weights(dense.abs() * x.square().mean(0).sqrt(), [columns // 2], m=block)
    return dense, dense * mask, x


def by_hand(w, dense, mean, variance, block):
    """One swap of one row as the equations say, in plain loops; None where there is none."""
    e = sum((d - v) * m for d, v, m in zip(dense, w, mean, strict=True))
    sign = 1 if e > 0 else -1
    blocks = [range(i, i + block) for i in range(0, len(w), block)]
    found = []
    for ids in blocks:
        goes = [j for j in ids if w[j] != 0 and sign * w[j] * mean[j] < 0]
        comes = [j for j in ids if w[j] == 0 and sign * dense[j] * mean[j] > 0]
        if goes:
            found += [(sign * dense[j] * mean[j] / variance[j], j, goes) for j in comes]
    if not found:
        return None
    _, grown, goes = max(found)
    pruned = min(goes, key=lambda j: abs(w[j]) * (mean[j] ** 2 + variance[j]) ** 0.5)
    after = e - dense[grown] * mean[grown] + w[pruned] * mean[pruned]
    return (grown, pruned) if abs(after) < abs(e) else None


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("seed", range(5))
def test_a_swap_is_the_one_of_the_equations(block, seed):
    dense, weight, x = problem(seed=seed, block=block)
    seen = Spread.of([x])
    new, made = swapped(weight, dense, seen, 1, 0.0, block)
    for i in range(len(dense)):
        w, old, mean, variance = (part.tolist() for part in (weight[i], dense[i], seen.mean, seen.variance))
        swap = by_hand(w, old, mean, variance, block or 16)
        expected = weight[i].clone()
        if swap is not None:
            expected[swap[0]], expected[swap[1]] = dense[i, swap[0]], 0
        assert torch.equal(new[i], expected)
        assert int(made[i]) == (swap is not None)


@pytest.mark.parametrize("block", [0, 4, 8])
def test_the_mean_error_falls_with_every_swap_and_no_count_changes(block):
    swaps = 0
    for seed in range(10):
        dense, weight, x = problem(seed=seed, block=block)
        seen = Spread.of([x])
        errors = [((dense - weight) @ x.mean(0)).abs()]
        for most in range(1, 9):
            new, made = swapped(weight, dense, seen, most, 0.0, block)
            errors.append(((dense - new) @ x.mean(0)).abs())
            fewer = errors[-1] < errors[-2]
            assert torch.equal(fewer, made == most)  # one more swap falls, no more is the same
            assert torch.equal(errors[-1][~fewer], errors[-2][~fewer])
            counts = (part.unflatten(1, (-1, block or 16)).ne(0).sum(2) for part in (weight, new))
            assert torch.equal(*counts)
            assert bool(((new == 0) | (new == dense)).all())
            swaps += int(made.sum())
    assert swaps > 100


def test_rows_that_are_good_enough_stay():
    dense, weight, x = problem()
    seen = Spread.of([x])
    assert torch.equal(swapped(weight, dense, seen, 50, 1e9)[0], weight)
    assert torch.equal(swapped(dense, dense, seen, 50, 0.0)[0], dense)
    centred = Spread.of([x - x.mean(0)])
    assert torch.equal(swapped(weight, dense, centred, 50, 1e-9)[0], weight)  # no mean, no mean error


def test_a_constant_input_grows_first():
    dense, weight, x = problem(rows=20)
    dead = (weight == 0).double().mean(0).argmax()
    x[:, dead] = 3.0
    new, _ = swapped(weight, dense, Spread.of([x]), 1, 0.0)
    e = (dense - weight) @ x.mean(0)
    useful = (weight[:, dead] == 0) & (e * dense[:, dead] > 0) & (new != weight).any(1)
    assert useful.any()
    assert bool((new[useful, dead] != 0).all())


def test_moments_do_not_depend_on_the_batches():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(60, 5, generator=rng, dtype=torch.float64) + 1e4 * torch.arange(5)
    x[30:] += 50  # batches differ in their means: variances within them miss that
    for cuts in ([60], [30, 30], [1, 20, 39]):
        seen = Spread.of(list(x.split(cuts)))
        torch.testing.assert_close(seen.mean, x.mean(0), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(seen.variance, x.var(0, correction=0), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("structure", ["weights", "2:4"])
def test_dense_weights_in_new_places_and_less_error(structure):
    net = toy_supernet(structure=structure, intermediate_size=16)
    piece = toy_workpiece(net, tokens=MANY)
    linears = [piece.adapter.linear(piece.adapter.blocks(piece.model)[s.block], s) for s in piece.sites]
    old = [linear.weight.clone() for linear in linears]
    said = DSnoT(threshold=0.0).finish(piece)
    assert said["swaps"] > 0
    assert said["squared_mean_error_left"] < 1
    for site, before, linear in zip(piece.sites, old, linears, strict=True):
        dense = piece.adapter.linear(piece.adapter.blocks(piece.dense)[site.block], site)
        new = linear.weight
        assert bool(((new == 0) | (new == dense.weight)).all())
        assert torch.equal((new != 0).sum(1), (before != 0).sum(1))
        if site.name in said["errors"]:
            assert said["errors"][site.name][1] <= said["errors"][site.name][0]
        else:
            assert torch.equal(new, before)
    assert not any(".mlp." in name for name in said["errors"])
    assert any(".mlp." in name for name in DSnoT(skip_mlp=False).finish(piece)["errors"])


def test_reported_errors_are_those_of_the_maps_on_what_they_receive():
    piece = toy_workpiece(toy_supernet(structure="weights"), tokens=MANY)
    said = DSnoT(guard=False, skip_mlp=False).finish(piece)
    for here in Twin(piece, MANY, tokens=999):
        y, made = here.wanted(0, "own"), here.made(0)
        left = float((y - made).square().sum() / y.square().sum())
        assert said["errors"][here.site.name][1] == pytest.approx(left)


def test_behind_moved_weights_the_mean_error_falls_all_the_same():
    piece = toy_workpiece(toy_supernet(structure="weights"), tokens=replace(MANY))
    for site in piece.sites:
        weight = piece.adapter.linear(piece.adapter.blocks(piece.model)[site.block], site).weight
        weight.data *= 1 + 0.3 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight)
    said = DSnoT().finish(piece)
    assert said["swaps"] > 0
    assert said["squared_mean_error_left"] < 1
