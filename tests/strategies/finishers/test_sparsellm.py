"""Every update is the best for its part, rounds go down where nothing is pruned, and no MLP gets worse."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

import prunekit
from prunekit.calibration.twin import Twin, whole_parts
from prunekit.models.adapters.find import adapter_for
from prunekit.testing import toy_supernet, toy_tokens, toy_workpiece
from prunekit_strategies.finishers.sparsellm import MLP, SparseLLM, derivatives, downhill, gated, hidden, rectified
from prunekit_strategies.pruners.score import Wanda

MANY = toy_tokens(windows=12)
RNG = torch.Generator()


def normal(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seeded():
    RNG.manual_seed(3)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_hidden_layer_is_stationary(ratio, bias):
    down = nn.Linear(9, 6, bias=bias).double().requires_grad_(False)
    y, h = normal(40, 6), normal(40, 9)
    p = hidden(down, y, h, ratio)
    slope = ratio * (down(p) - y) @ down.weight + (p - h)
    assert float(slope.abs().max()) < 1e-12
    inverse = torch.linalg.inv(ratio * down.weight.T @ down.weight + torch.eye(9).double())
    rest = y if down.bias is None else y - down.bias
    torch.testing.assert_close(p, (ratio * rest @ down.weight + h) @ inverse)  # the paper's form, a (d_ff, d_ff) solve


@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
def test_the_gated_factor_is_stationary_for_any_ratio(ratio):
    m, p, sigma = normal(50, 3), normal(50, 3), normal(50, 3)
    z = gated(m, p, sigma, ratio)
    assert float((z - m + ratio * sigma * (sigma * z - p)).abs().max()) < 1e-12


@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
def test_the_rectified_one_is_the_lowest_of_a_fine_grid(ratio):
    m, p = 2 * normal(200), 2 * normal(200)
    z, grid = rectified(m, p, ratio), torch.linspace(-12, 12, 24001, dtype=torch.float64)[:, None]

    def loss(z):
        return (z - m).square() + ratio * (p - z.clamp_min(0)).square()

    assert bool((loss(z) <= loss(grid).min(0).values + 1e-12).all())
    assert float((loss(grid).min(0).values - loss(z)).max()) < 1e-5


@pytest.mark.parametrize("phi", [silu, nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.Tanh()])
def test_activations_end_where_nothing_is_lower_nearby(phi):
    m, p, c, start = (2 * normal(40, 7) for _ in range(4))
    s = downhill(m, p, c, start, phi, 0.7, 60)

    def loss(s):
        return (s - m).square() + 0.7 * (p - c * phi(s)).square()

    first = derivatives(phi, s)[1]
    slope = (s - m) - 0.7 * c * first * (p - c * phi(s))
    flat = slope.abs() < 1e-6
    kink = isinstance(phi, nn.ReLU) & (s.abs() < 1e-6)
    assert bool((flat | kink).all())
    assert bool((loss(s) <= torch.minimum(loss(m), loss(start)) + 1e-12).all())
    for step in (-1e-4, 1e-4):
        assert bool((loss(s) <= loss(s + step) + 1e-12).all())


def test_derivatives_are_those_of_differences():
    s, step = normal(30), 1e-4
    value, first, second = derivatives(silu, s)
    torch.testing.assert_close(value, silu(s))
    torch.testing.assert_close(first, (silu(s + step) - silu(s - step)) / (2 * step), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second, (silu(s + step) - 2 * silu(s) + silu(s - step)) / step**2, rtol=1e-5, atol=1e-6)


def mlps(piece):
    """(sub-layer, MLP, x, y) of every block, behind the small model's own layers."""
    for here in Twin(whole_parts(piece), piece.tokens, tokens=999):
        if here.site.kind == "mlp":
            yield here, MLP.of(here, piece), here.entering(0).flatten(0, 1), here.wanted(0, "dense").flatten(0, 1)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_an_mlp_is_what_the_model_has(family):
    piece = toy_workpiece(toy_supernet(family, structure="weights"), tokens=MANY)
    for here, mlp, x, _ in mlps(piece):
        torch.testing.assert_close(mlp.merged([w(x) for w in mlp.front]), here.inputs(0).reshape(len(x), -1))
        for linear in mlp.maps:
            site, count = mlp.counts[linear]
            assert piece.adapter.linear(here.block, site) is linear
            assert piece.plan[piece.sites.index(site)] == count


def test_an_mlp_whose_gate_and_up_are_one_map_is_refused():
    with pytest.raises(prunekit.WrongInput, match="gate and up are maps of their own; take least-squares"):
        SparseLLM().check(adapter_for("phi3"))


def total(mlp, x, y, pre, p):
    """(1) or (2) with α = 0.3, β = 0.7, γ = 0.2."""
    apart = sum(float((z - w(x)).square().sum()) for z, w in zip(pre, mlp.front, strict=True))
    inner, outer = (p - mlp.merged(pre)).square().sum(), (y - mlp.down(p)).square().sum()
    return 0.3 * apart + 0.2 * float(inner) + 0.7 * float(outer)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_the_sum_falls_with_every_update_where_nothing_is_pruned(family):
    net = toy_supernet(family, structure="weights")
    piece = toy_workpiece(net, plan=tuple(site.n_groups for site in net.space.sites), tokens=MANY)
    finisher = SparseLLM(alpha=0.3, beta=0.7, gamma=0.2, pruner=Wanda())
    for _, mlp, x, y in mlps(piece):
        for linear in mlp.maps:
            linear.weight += 0.3 * normal(*linear.weight.shape)
        pre = [normal(*linear(x).shape) for linear in mlp.front]
        p = mlp.merged(pre)

        totals = [total(mlp, x, y, pre, p)]
        for _ in range(4):
            p = hidden(mlp.down, y, mlp.merged(pre), 0.7 / 0.2)
            totals.append(total(mlp, x, y, pre, p))
            pre = finisher._before(mlp, x, p, pre)
            totals.append(total(mlp, x, y, pre, p))
            for linear, wanted in zip(mlp.front, pre, strict=True):
                finisher._fit(mlp, linear, x, wanted)
                totals.append(total(mlp, x, y, pre, p))
            finisher._fit(mlp, mlp.down, p, y)
            totals.append(total(mlp, x, y, pre, p))
        assert all(b <= a * (1 + 1e-12) for a, b in pairwise(totals))
        assert totals[-1] < 0.5 * totals[0]


@torch.no_grad()
def test_a_fit_is_the_ridge_solution_and_keeps_what_no_token_reaches():
    net = toy_supernet(structure="weights")
    piece = toy_workpiece(net, plan=tuple(site.n_groups for site in net.space.sites), tokens=MANY)
    finisher = SparseLLM(damping=0.05, pruner=Wanda())
    _, mlp, x, _ = next(mlps(piece))
    x = x * (torch.arange(24) != 5)
    linear, wanted = mlp.front[0], normal(len(x), 17)
    before = linear.weight.clone()
    finisher._fit(mlp, linear, x, wanted)
    ridge = 0.05 * float((x.T @ x).diagonal().mean()) / len(x)
    slope = (linear(x) - wanted).T @ x / len(x) + ridge * (linear.weight - before)
    assert float(slope.abs().max()) < 1e-12
    assert torch.equal(linear.weight[:, 5], before[:, 5])


@pytest.mark.parametrize("aim", ["own", "dense", "stream"])
@pytest.mark.parametrize("structure", ["weights", "2:4"])
def test_no_mlp_gets_worse_and_errors_are_the_errors(aim, structure):
    piece = toy_workpiece(toy_supernet(structure=structure, intermediate_size=16), tokens=MANY)
    attention = {n: p.clone() for n, p in piece.model.named_parameters() if "self_attn" in n}
    said = SparseLLM(aim=aim, rounds=2, newton=4).finish(piece)
    assert said["of"] == 3
    assert said["changed"] == sum(after < before for before, after in said["errors"].values()) > 0
    for here in Twin(whole_parts(piece), MANY, tokens=999):
        if here.site.kind == "mlp":
            y = here.wanted(0, aim)
            before, after = said["errors"][here.site.name]
            assert after <= before
            assert after == pytest.approx(float((y - here.made(0)).square().sum() / y.square().sum()))
    assert all(torch.equal(attention[n], p) for n, p in piece.model.named_parameters() if n in attention)


def test_another_mlp_is_refused():
    piece = toy_workpiece(toy_supernet(structure="weights"), tokens=replace(MANY))
    here, mlp, x, _ = next(mlps(piece))
    with pytest.raises(prunekit.WrongInput, match="φ"):
        replace(mlp, phi=nn.Tanh()).check(x, here.inputs(0).flatten(0, 1))
    here.block.get_submodule("mlp").act_fn = nn.Identity()
    with pytest.raises(prunekit.WrongInput, match="activation"):
        MLP.of(here, piece)
