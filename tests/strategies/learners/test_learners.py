"""What each learner's paper, or its docstring, promises beside the suite."""

import itertools

import pytest
import torch

from prunekit.layer.knapsack import Knapsack
from prunekit.plugins.learner import GateProblem, GateQuery, Learner
from prunekit.testing.learners import Surface, every_mask, lesson, mask_of, noisy, problem_of, space_of
from prunekit_strategies.learners.bypass_bp import BypassBP, gradient
from prunekit_strategies.learners.ddp import DDP, lagrangian, smoothed
from prunekit_strategies.learners.gisp import GISP
from prunekit_strategies.learners.grasprune import GRASPrune

SIZES = [3, 5, 2, 6]


def left(plugin: Learner, power: int, seed: int) -> float:
    """How far the decision is from the optimum, as a share of how far the mean mask is."""
    space = space_of(SIZES, [3, 1, 3, 1], 0.5)
    rng = torch.Generator().manual_seed(seed)
    worth = Knapsack(space).price * (0.1 + torch.rand(16, generator=rng, dtype=torch.float64)) / 8
    surface = Surface(worth, power, noise=noisy(16, seed))
    decision = lesson(plugin, problem_of(space), surface.answer).decisions[0]
    found, losses = float(surface.lost(mask_of(decision, SIZES)[None])), surface.lost(every_mask(space))
    return (found - float(losses.min())) / float(losses.mean() - losses.min())


def test_grasprune_ranks_by_effect_where_the_published_options_rank_by_certainty() -> None:
    def mean(second_moment: str, decide: str) -> float:
        plugin = GRASPrune(steps=64, rate=0.05, batch_tokens=8, second_moment=second_moment, decide=decide)  # type: ignore[arg-type]
        return sum(left(plugin, power, seed) for power in (1, 2) for seed in (1, 2)) / 4

    assert mean("shared", "occupancy") < 0.02
    assert mean("own", "score") > 0.3


def test_grasprune_asks_only_with_masks_that_spend_the_budget_and_scales_what_is_kept() -> None:
    space = space_of([3, 6], [2, 1], 0.5)
    surface, asked = Surface(torch.linspace(0.1, 1, 9, dtype=torch.float64), 2), list[GateQuery]()
    plugin = GRASPrune(steps=8, batch_tokens=8, scale_steps=4)
    (decision,) = lesson(plugin, problem_of(space), surface.answer, asked=asked).decisions
    assert all(float(query.gates @ Knapsack(space).price) == 6 for query in asked[:8])
    keep = mask_of(decision, [3, 6])
    assert decision.scales is not None
    assert torch.equal((decision.scales != 0).double(), keep)
    assert all(torch.equal((query.gates != 0).double(), keep) for query in asked[8:])


def test_bypass_bp_estimates_the_gradient_of_the_expected_loss() -> None:
    p = torch.tensor([0.2, 0.7, 0.5], dtype=torch.float64)
    surface = Surface(torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64), pairs=torch.ones(3, 3).double())
    masks = [torch.tensor(bits, dtype=torch.float64) for bits in itertools.product((0.0, 1.0), repeat=3)]
    losses = surface.lost(torch.stack(masks)).tolist()
    chance = [float((m * p + (1 - m) * (1 - p)).prod()) for m in masks]
    pairs = itertools.product(range(8), repeat=2)  # all that two draws can be
    mean = sum(chance[i] * chance[j] * gradient(p, [masks[i], masks[j]], [losses[i], losses[j]]) for i, j in pairs)
    leaf = p.clone().requires_grad_()
    expected = sum((m * leaf + (1 - m) * (1 - leaf)).prod() * loss for m, loss in zip(masks, losses, strict=True))
    (slope,) = torch.autograd.grad(expected, leaf)  # type: ignore[arg-type]
    torch.testing.assert_close(mean, slope * (p * (1 - p)).sqrt())


def test_ddp_counts_nothing_at_zero_half_in_the_middle_and_all_at_twice_that() -> None:
    for width in (0.5, 0.05):
        s = smoothed(torch.tensor([-1.0, 0.0, width, 2 * width, 3.0], dtype=torch.float64), width)
        assert s.tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    z, share = torch.tensor([0.1, 0.6], dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)
    _, slope = lagrangian(z, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), share, 0.3, 0.4)
    assert bool((slope > 0).all()), "a multiplier on the price closes gates"


def test_gisp_in_one_step_is_the_ranking_by_importance_and_masks_fall_from_step_to_step() -> None:
    space, worth = space_of([3, 6], [2, 1], 0.5), torch.linspace(1, 0.1, 9, dtype=torch.float64)
    one = lesson(GISP(steps=1), GateProblem((space,), 64, 8), Surface(worth).answer).decisions[0]
    assert torch.equal(mask_of(one, [3, 6]).bool(), Knapsack(space).project(worth))
    asked: list[GateQuery] = []
    lesson(GISP(steps=4), GateProblem((space,), 64, 8), Surface(worth).answer, asked=asked)
    assert all(bool((b.gates <= a.gates).all()) for a, b in itertools.pairwise(asked))


@pytest.mark.parametrize(
    "make", [lambda: GRASPrune(steps=0), lambda: BypassBP(draws=1), lambda: DDP(narrow=0.0), lambda: GISP(tokens=0)]
)
def test_options_that_cannot_be_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"at least 1|above 0"):
        make()  # type: ignore[operator]
