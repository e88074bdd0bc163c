"""ADMM keeps what it promises on problems that can be solved; models become sparse, exactly, and better for it."""

import dataclasses
import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from prunekit import best_weights
from prunekit.run.finish import check_finished, shapes
from prunekit.system.checkpoints import Checkpoints
from prunekit.testing import toy_supernet, toy_tokens, toy_workpiece
from prunekit_strategies.finishers.elsa import LARGEST, SMALLEST, Elsa, ElsaL, Map, Weights, _maps, rounded
from prunekit_strategies.finishers.training import LanguageLoss, held_out

MANY = toy_tokens(windows=16)
QUICK: dict[str, Any] = {"steps": 16, "batch_tokens": 48, "interval": 4, "rate": 3e-3}
DICE = torch.Generator()


class Quadratic:
    """f(x) = ½ tr (x - w) H (x - w)ᵀ, x (rows, n): every row a least-squares problem."""

    def __init__(self, rows=2, n=6, seed=0):
        rng = torch.Generator().manual_seed(seed)
        inputs = torch.randn(n, 3 * n, generator=rng, dtype=torch.float64)
        self.h = inputs @ inputs.T / n
        self.w = torch.randn(rows, n, generator=rng, dtype=torch.float64)

    def gradient(self, x):
        return (x - self.w) @ self.h

    def least_squares(self, mask):
        found = torch.zeros_like(self.w)
        for row, kept in enumerate(mask):
            right = self.w[row] @ self.h[:, kept]
            found[row, kept] = torch.linalg.solve(self.h[kept][:, kept], right)
        return found

    def closest(self, penalty, target):
        """argmin f(x) + λ/2 ‖x - target‖²."""
        left = self.h + penalty * torch.eye(len(self.h), dtype=torch.float64)
        return torch.linalg.solve(left, (self.w @ self.h + penalty * target).T).T

    def map(self, keep, **options):
        x = nn.Parameter(self.w.clone())
        z = torch.where(best_weights(self.w.abs(), [keep], "layer")[0], self.w, 0)
        return Map(x, z, keep, 0, Elsa(**dict[str, Any]({"aware": False, "coupled": True} | options)))


@pytest.mark.parametrize("per", ["layer", "row"])
def test_from_the_dense_weights_the_sparse_copy_begins_as_their_largest(per):
    """As the released code has it; from the pruned ones both begin there."""
    piece = _piece()
    small = [part.x.detach().clone() for part in _maps(Elsa(), piece)]
    for part, began in zip(_maps(Elsa(), piece), small, strict=True):
        assert torch.equal(part.get("z"), began)
    blocks = piece.adapter.blocks(piece.dense)
    for part, site in zip(_maps(Elsa(start="dense", per=per), piece), piece.sites, strict=True):
        dense = piece.adapter.linear(blocks[site.block], site).weight
        assert torch.equal(part.x, dense)
        kept = best_weights(dense.abs(), [part.keep], per, 0)[0]
        assert torch.equal(part.get("z"), torch.where(kept, dense, 0))


def admm(problem, part, penalty, rounds):
    """With (1) solved exactly; the last change of z and of x - z."""
    still = float("inf")
    for _ in range(rounds):
        before = part.get("z")
        part.x.data = problem.closest(penalty, before - part.get("u"))
        part.project(1.0)
        still = max(float((part.get("z") - before).abs().max()), float((part.x - part.get("z")).detach().abs().max()))
        if still < 1e-12:
            break
    return still


@pytest.mark.parametrize("share", [0.1, 1.0, 10.0])
def test_on_a_fixed_support_the_limit_is_the_least_squares_on_it_and_the_dual_minus_the_gradient(share):
    problem = Quadratic()
    part, penalty = problem.map(2), share * float(problem.h.diagonal().mean())
    mask = part.get("z") != 0
    part.best = lambda weight: mask
    assert admm(problem, part, penalty, 20_000) < 1e-11
    z, dual = part.get("z"), penalty * part.get("u")
    torch.testing.assert_close(z, problem.least_squares(mask), rtol=0, atol=1e-9)
    torch.testing.assert_close(dual, -problem.gradient(z), rtol=0, atol=1e-9)
    assert not dual[mask].abs().gt(1e-9).any()


@pytest.mark.parametrize("coupled", [True, False])
def test_adam_finds_the_same_limit(coupled):
    problem = Quadratic()
    part = problem.map(2, coupled=coupled)
    mask, steps = part.get("z") != 0, 3000
    part.best = lambda weight: mask
    for step in range(steps):
        part.x.grad = problem.gradient(part.x.detach())
        part.step(0.02 * (1 - step / steps), step + 1, 1.0 if coupled else 0.02, DICE)
        if step % 10 == 9:
            part.project(1.0)
    torch.testing.assert_close(part.x.detach(), problem.least_squares(mask), rtol=0, atol=5e-3)
    if coupled:
        torch.testing.assert_close(part.get("u"), -problem.gradient(part.get("z")), rtol=0, atol=1e-2)


@pytest.mark.parametrize("seed", range(6))
def test_what_large_penalties_choose_is_optimal_on_its_support_and_small_ones_never_settle(seed):
    problem = Quadratic(rows=1, n=8, seed=seed)
    largest = float(torch.linalg.eigvalsh(problem.h)[-1])
    for factor in (1.0, 2.0):
        part = problem.map(4)
        assert admm(problem, part, factor * largest, 6000) < 1e-10
        z = part.get("z")
        torch.testing.assert_close(z, problem.least_squares(z != 0), rtol=0, atol=1e-8)
        step = z - problem.gradient(z) / (factor * largest)
        torch.testing.assert_close(torch.where(part.best(step), step, 0), z, rtol=0, atol=1e-8)
    assert admm(problem, problem.map(4), 0.05 * largest, 1500) > 1e-6


def test_without_a_penalty_it_is_adam():
    problem = Quadratic()
    part, twin = problem.map(2), nn.Parameter(problem.w.clone() + 1)
    part.x.data = twin.detach().clone()
    adam = torch.optim.Adam([twin], lr=0.1, betas=(0.9, 0.95))
    for step in range(20):
        for x in (part.x, twin):
            x.grad = problem.gradient(x.detach())
        adam.step()
        part.step(0.1, step + 1, 0.0, DICE)
    torch.testing.assert_close(part.x, twin)


def test_with_all_weights_kept_nothing_is_pulled():
    problem = Quadratic()
    part = problem.map(6)
    for step in range(12):
        part.x.grad = problem.gradient(part.x.detach()) + 1
        part.step(0.1, step + 1, 0.5, DICE)
        part.project(0.7)
        assert not part.get("u").any()
        assert torch.equal(part.get("z"), part.x)
    assert part.harden()[0] == 0


def test_what_is_added_to_the_gradient_is_the_gradient_of_the_pull():
    problem = Quadratic()
    part, seen = problem.map(2), []
    part.put("u", torch.randn(part.x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    part.x.data += 0.3
    z, u, penalty = part.get("z"), part.get("u"), 0.7

    def augmented(x):
        return 0.5 * ((x - problem.w) @ problem.h * (x - problem.w)).sum() + 0.5 * penalty * (x - z + u).square().sum()

    part.x.grad = problem.gradient(part.x.detach())
    at = part.x.detach().clone()
    part.step(1e-3, 1, penalty, DICE)
    gradient = part.get("m") / (1 - 0.9)  # the first step
    for i, j in itertools.product(*map(range, at.shape)):
        nudge = torch.zeros_like(at)
        nudge[i, j] = 1e-5
        seen.append((augmented(at + nudge) - augmented(at - nudge)) / 2e-5)
    torch.testing.assert_close(gradient.flatten(), torch.stack(seen), rtol=1e-7, atol=1e-8)


def test_a_change_of_the_penalty_leaves_the_dual_as_it_was():
    part = Quadratic().map(2)
    part.x.data += 0.1
    apart = part.x - torch.where(part.best(part.x), part.x, 0)
    part.project(1 / 3)
    torch.testing.assert_close(3.0 * part.get("u"), apart)


@pytest.mark.parametrize("aware", [True, False])
def test_the_projection_loses_least_of_all_supports_and_is_exact_under_ties(aware):
    rng = torch.Generator().manual_seed(0)
    part = Quadratic(rows=2, n=4).map(2, aware=aware)
    fisher = torch.rand(2, 4, generator=rng, dtype=torch.float64) if aware else torch.ones(2, 4, dtype=torch.float64)
    part.put("v", fisher)
    weight = torch.randn(2, 4, generator=rng, dtype=torch.float64)
    price = (fisher * weight.square()).flatten()
    cheapest = min(itertools.combinations(range(8), 4), key=lambda lost: float(price[list(lost)].sum()))
    assert set((~part.best(weight)).flatten().nonzero().flatten().tolist()) == set(cheapest)
    part.put("v", torch.ones(2, 4, dtype=torch.float64))
    for value in (0.0, 1.0):
        assert torch.equal(part.best(torch.full((2, 4), value)), torch.tensor([[True, True, False, False]] * 2))


def test_fp8_keeps_zeros_and_is_close_and_chance_is_fair():
    rng = torch.Generator().manual_seed(0)
    value = 0.02 * torch.randn(50, 200, generator=rng)
    value[value.abs() < 0.01] = 0
    for rows in (False, True):
        numbers, scale = rounded(value, rows=rows)
        assert numbers.dtype == torch.float8_e4m3fn
        assert scale.shape == ((50, 1) if rows else (1, 1))
        back = numbers.float() * scale
        assert not back[value == 0].any()
        normal = value.abs() >= scale * 2**-6
        assert ((back - value).abs()[normal] <= 2**-4 * value.abs()[normal] * (1 + 1e-5)).all()
        assert ((back - value).abs() <= torch.maximum(2**-4 * value.abs(), scale * SMALLEST / 2) * (1 + 1e-5)).all()
        assert (numbers.float().abs() < LARGEST).all()
        thrown = torch.stack([(n.float() * s) for n, s in (rounded(value, rows=rows, dice=rng) for _ in range(200))])
        assert not thrown[:, value == 0].any()
        assert (thrown - value).abs().le(torch.maximum(value.abs() / 8, scale * SMALLEST) * (1 + 1e-5)).all()
        error = (thrown.mean(0) - value)[value != 0] / value[value != 0]
        assert error.abs().mean() < 0.003  # the nearest number is off by 0.02
    assert not any(part.float().isnan().any() for part in rounded(torch.zeros(2, 3)))


def test_small_states_learn_as_large_ones_do():
    problem = Quadratic(rows=4, n=8)
    large, small = (problem.map(3, quantised=quantised) for quantised in (False, True))
    mask = large.get("z") != 0
    for step in range(600):
        for part in (large, small):
            part.best = lambda weight: mask
            part.x.grad = problem.gradient(part.x.detach())
            part.step(0.03 * (1 - step / 600), step + 1, 0.5, DICE.manual_seed(step))
            if step % 10 == 9:
                part.project(1.0)
    assert torch.equal(large.get("z") != 0, small.get("z") != 0)
    torch.testing.assert_close(small.x, large.x, rtol=0, atol=0.1)
    stored = sum(value.element_size() * value.numel() for key, value in small.kept.items() if "scale" not in key)
    assert stored == 5 * small.x.numel()  # beside x: z, m, v of one byte, u of two


def test_a_second_moment_in_fp8_falls_when_gradients_do():
    part = Weights(nn.Parameter(torch.zeros(1, 64)), quantised=True)
    for step in range(120):
        part.x.grad = torch.full((1, 64), 1.0 if step < 20 else 0.1)
        part.step(1e-3, step + 1, 0.0, DICE.manual_seed(step))
    torch.testing.assert_close(part.get("v").sqrt().mean(), torch.tensor(0.122), rtol=0.1, atol=0)


@cache
def _net(structure):
    return toy_supernet(structure=structure, intermediate_size=16)


def _piece(structure="weights", **changes):
    return toy_workpiece(_net(structure), tokens=MANY, **changes)


def _weights(piece):
    blocks = piece.adapter.blocks(piece.model)
    return [piece.adapter.linear(blocks[site.block], site).weight for site in piece.sites]


@pytest.mark.parametrize("plugin", [Elsa, ElsaL])
@pytest.mark.parametrize("structure", ["weights", "2:4"])
@pytest.mark.parametrize("settle", [0.0, 0.5])
def test_every_map_has_its_count_exactly_and_the_loss_falls(plugin, structure, settle):
    piece = _piece(structure)
    before = shapes(piece.model)
    finisher = plugin(**QUICK, start="pruned", settle=settle, teacher=1.0)
    said = finisher.finish(piece)
    check_finished(piece, finisher, before)
    for weight, site, keep in zip(_weights(piece), piece.sites, piece.plan, strict=True):
        there = weight != 0
        assert int(there.sum()) == keep * len(weight)
        if site.form.m:
            assert (there.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    first, last = said["held_out_loss"]
    assert last < first
    _, judge = held_out(MANY, 0.125)
    assert LanguageLoss(piece.model, piece.dense, 1.0, 1.0).mean([judge.ids]) == pytest.approx(last)
    assert 0 < said["gap"] < 1
    assert said["tokens"] == 16 * 48


def test_counts_are_the_allocators_map_by_map():
    plan = tuple((5 * i) % (site.n_groups + 1) for i, site in enumerate(_net("weights").space.sites))
    piece = _piece(plan=plan)
    Elsa(**QUICK).finish(piece)
    assert [int((w != 0).sum()) for w in _weights(piece)] == [
        k * len(w) for k, w in zip(plan, _weights(piece), strict=True)
    ]


@pytest.mark.parametrize("others", [True, False])
def test_what_is_not_pruned_learns_where_it_may(others):
    piece = _piece()
    maps = {f"{site.name}.weight" for site in piece.sites}
    before = {name: p.clone() for name, p in piece.model.named_parameters()}
    Elsa(**QUICK, others=others).finish(piece)
    changed = {name for name, p in piece.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == (set(before) if others else maps)


def test_from_the_pruned_weights_without_a_pull_zeros_stay_zero_nowhere_but_the_count_does():
    piece = _piece()
    zeros = [w == 0 for w in _weights(piece)]
    Elsa(**QUICK, start="pruned", penalty=0.0, settle=0.0).finish(piece)
    assert all((w != 0).sum() == (~zero).sum() for w, zero in zip(_weights(piece), zeros, strict=True))
    assert any((w[zero] != 0).any() for w, zero in zip(_weights(piece), zeros, strict=True))


def test_a_whole_model_is_trained_as_adam_does():
    piece = _piece(plan=tuple(site.n_groups for site in _net("weights").space.sites))
    train, _ = held_out(MANY, 0.125)
    twin = [p.detach().clone().requires_grad_() for p in piece.model.parameters()]
    said = Elsa(steps=3, batch_tokens=12 * 14, penalty=0.0, settle=0.0, rate=1e-3).finish(piece)
    learnt = [p.detach().clone() for p in piece.model.parameters()]
    adam = torch.optim.Adam(twin, lr=1e-3, betas=(0.9, 0.95))
    for step in range(3):
        for p, t in zip(piece.model.parameters(), twin, strict=True):
            p.data = t.data
        loss = LanguageLoss(piece.model, piece.dense, 1.0, 0.0)
        for p in piece.model.parameters():
            p.requires_grad_(True)
        for t, gradient in zip(twin, torch.autograd.grad(loss(train.ids), list(piece.model.parameters())), strict=True):
            t.grad = gradient
        nn.utils.clip_grad_norm_(twin, 1.0)
        adam.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        adam.step()
    for one, two in zip(learnt, twin, strict=True):
        torch.testing.assert_close(one, two.detach(), rtol=1e-9, atol=1e-9)
    assert said["gap"] == 0


def test_micro_batches_change_nothing():
    one, two = _piece(), _piece()
    for piece, micro in ((one, 1000), (two, 12)):
        dataclasses.replace(Elsa(**QUICK), steps=6, micro_tokens=micro).finish(piece)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("plugin", "saves"), [(Elsa, 1), (Elsa, 5), (ElsaL, 3), (ElsaL, 7)])
def test_a_killed_run_ends_in_the_same_bits(plugin, saves, tmp_path, killed_at):
    finisher = dataclasses.replace(plugin(**QUICK), steps=10, schedule="cosine")
    whole = _piece()
    said = finisher.finish(whole)
    with killed_at(Checkpoints, "save", saves, after=True):
        finisher.finish(_piece(checkpoints=Checkpoints(tmp_path)))
    for _ in range(2):  # the second one finds all of it done
        again = _piece(checkpoints=Checkpoints(tmp_path))
        assert finisher.finish(again) == said
        for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_gradient_that_is_no_number_is_left_out(monkeypatch):
    calls = itertools.count()
    plain = LanguageLoss.__call__
    broken = lambda self, ids: plain(self, ids) * (float("nan") if next(calls) == 3 else 1.0)  # noqa: E731
    monkeypatch.setattr(LanguageLoss, "__call__", broken)
    piece = _piece()
    said = Elsa(**QUICK).finish(piece)
    assert said["steps"] == 15
    assert all(bool(torch.isfinite(p).all()) for p in piece.model.parameters())


def test_the_penalty_rises_as_it_is_told_with_the_projections():
    for schedule in ("constant", "linear", "cosine", "exponential"):
        finisher = Elsa(steps=100, settle=0.2, interval=10, schedule=schedule)
        heights = [finisher.height(step) for step in range(81)]
        assert heights == sorted(heights)
        assert heights[0] == pytest.approx(1.0 if schedule == "constant" else 0.01)
        assert heights[80] == pytest.approx(1.0)
        assert len(set(heights)) == (1 if schedule == "constant" else 9)
