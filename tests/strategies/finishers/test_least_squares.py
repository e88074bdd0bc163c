"""The refit is the one of linear algebra, the pruner's own where there is nothing in front, and never worse."""

from dataclasses import replace

import pytest
import torch

from prunekit import Recipe, WrongInput, resolve
from prunekit.calibration.twin import Twin
from prunekit.layer.problem import LayerProblem
from prunekit.models.classes import LowRank
from prunekit.testing import toy_supernet, toy_tokens, toy_workpiece
from prunekit_strategies.finishers.bias import Bias
from prunekit_strategies.finishers.least_squares import LeastSquares

MANY = toy_tokens(windows=12)  # more tokens than columns: the least-squares solution is unique


def flat(x):
    return x.flatten(0, 1)


def error(piece, aim):
    """Σ ‖y - ŷ‖² by site, behind the small model's own layers."""
    return {h.site: float((h.wanted(0, aim) - h.made(0)).square().sum()) for h in Twin(piece, piece.tokens, tokens=999)}


@pytest.mark.parametrize("aim", ["own", "dense", "stream"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_site_has_the_solution_of_lstsq(aim, bias, family):
    piece = toy_workpiece(toy_supernet(family), tokens=MANY)
    LeastSquares(aim=aim, bias=bias, damping=0.0).finish(piece)
    for here in Twin(piece, piece.tokens, tokens=999):
        x, y = flat(here.inputs(0)), flat(here.wanted(0, aim))
        if bias:
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        elif here.linear.bias is not None:
            y = y - here.linear.bias
        solution = torch.linalg.lstsq(x, y, driver="gelsd").solution.T
        ours = here.linear.weight if not bias else torch.cat([here.linear.weight, here.linear.bias[:, None]], 1)
        torch.testing.assert_close(x @ ours.T, x @ solution.T, rtol=1e-6, atol=1e-6)
        if int(torch.linalg.matrix_rank(x)) == x.shape[1]:  # else, as behind dead ReLUs, there are many solutions
            torch.testing.assert_close(ours, solution, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [0, 1])
def test_behind_dense_layers_it_is_the_pruners_refit(index):
    net = toy_supernet()
    site, plan = net.space.sites[index], [s.n_groups for s in net.space.sites]
    plan[index] = site.n_groups // 2
    piece = toy_workpiece(net, plan=tuple(plan), tokens=MANY)
    x = next(flat(h.dense_inputs(0)) for h in Twin(piece, MANY, tokens=999) if h.site is site)
    dense = piece.adapter.linear(piece.adapter.blocks(piece.dense)[0], site)
    refitted = LayerProblem(dense.weight, x.T @ x / len(x), site.group_size, damping=0.0).refitted(piece.kept[index])
    LeastSquares(damping=0.0).finish(piece)
    small = piece.adapter.linear(piece.adapter.blocks(piece.model)[0], site)
    torch.testing.assert_close(small.weight, refitted.weight[:, site.columns(piece.kept[index])])


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("bias", [False, True])
def test_reported_errors_are_the_errors_and_never_rise(damping, bias):
    piece = toy_workpiece(tokens=MANY)
    said = LeastSquares(aim="dense", damping=damping, bias=bias).finish(piece)
    after = error(piece, "dense")
    for here in Twin(piece, MANY, tokens=999):
        before, left = said["errors"][here.site.name]
        assert left <= before * (1 + 1e-9)
        assert left == pytest.approx(after[here.site] / float(here.wanted(0, "dense").square().sum()), rel=1e-6)


@pytest.mark.parametrize("structure", ["weights", "2:4"])
@pytest.mark.parametrize("aim", ["own", "dense", "stream"])
@pytest.mark.parametrize("exact", [1024, 0])
def test_every_row_has_the_solution_of_lstsq_on_its_support(structure, aim, exact):
    piece = toy_workpiece(toy_supernet(structure=structure, intermediate_size=16), tokens=MANY)
    masks = {s: piece.adapter.linear(piece.adapter.blocks(piece.model)[s.block], s).weight != 0 for s in piece.sites}
    said = LeastSquares(aim=aim, damping=0.0, exact=exact, steps=500).finish(piece)
    for here in Twin(piece, MANY, tokens=999):
        x, y, weight, mask = flat(here.inputs(0)), flat(here.wanted(0, aim)), here.linear.weight, masks[here.site]
        assert not bool(weight[~mask].any())
        for row in range(0, len(mask), 5):
            ours = x @ weight[row]
            theirs = x[:, mask[row]] @ torch.linalg.lstsq(x[:, mask[row]], y[:, row], driver="gelsd").solution
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        before, after = said["errors"][here.site.name]
        assert after <= before * (1 + 1e-9)
        assert after == pytest.approx(float((y - x @ weight.T).square().sum() / y.square().sum()), rel=1e-6)


@pytest.mark.parametrize("aim", ["own", "stream"])
def test_of_low_rank_the_second_map_has_the_solution_of_lstsq(aim):
    net = toy_supernet(structure="low-rank")
    piece = toy_workpiece(net, plan=tuple(max(1, site.n_groups // 2) for site in net.space.sites), tokens=MANY)
    blocks = piece.adapter.blocks(piece.model)
    maps = {site: piece.adapter.linear(blocks[site.block], site) for site in piece.sites}
    pairs = {site: found for site, found in maps.items() if isinstance(found, LowRank)}
    assert len(pairs) == len(piece.sites)
    first = {site: found.v.weight.clone() for site, found in pairs.items()}
    said = LeastSquares(aim=aim, damping=0.0).finish(piece)
    for here in Twin(piece, MANY, tokens=999):
        low = pairs[here.site]
        assert torch.equal(low.v.weight, first[here.site])
        x, y = flat(low.v(here.inputs(0))), flat(here.wanted(0, aim))
        theirs = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
        torch.testing.assert_close(x @ low.u.weight.T, theirs, rtol=1e-6, atol=1e-6)
        before, after = said["errors"][here.site.name]
        assert after <= before * (1 + 1e-9)


def test_with_a_bias_it_beats_either_alone():
    net, left = toy_supernet(), {}
    plan = tuple(s.n_groups if i != 1 else 8 for i, s in enumerate(net.space.sites))
    for name, finisher in (
        ("bias", Bias()),
        ("fit", LeastSquares(damping=0.0)),
        ("both", LeastSquares(bias=True, damping=0.0)),
    ):
        piece = toy_workpiece(net, plan=plan, tokens=MANY)
        finisher.finish(piece)
        left[name] = error(piece, "dense")[piece.sites[1]]
    assert left["both"] < min(left["fit"], left["bias"])


def test_damping_draws_towards_the_present_weights():
    distances = []
    for damping in (0.01, 1.0, 1e6):
        piece = toy_workpiece(tokens=MANY)
        start = [p.clone() for p in piece.model.parameters()]
        LeastSquares(damping=damping).finish(piece)
        distances.append(
            sum(float((a - b).square().sum()) for a, b in zip(start, piece.model.parameters(), strict=True))
        )
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6


def test_few_tokens_and_dead_inputs_are_survived():
    piece = toy_workpiece(tokens=replace(MANY, ids=MANY.ids[:1, :3]))
    LeastSquares(damping=0.0, bias=True).finish(piece)
    assert all(torch.isfinite(p).all() for p in piece.model.parameters())


def test_biases_are_refused_where_single_weights_go():
    single = {"structure": "weights", "pruner": "wanda", "finishers": [{"name": "least-squares", "bias": True}]}
    with pytest.raises(WrongInput, match="adds biases"):
        resolve(Recipe.load().with_overrides(single))
