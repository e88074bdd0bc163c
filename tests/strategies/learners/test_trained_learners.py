"""What learners that train weights along promise beside the suite: closed forms, finite differences, exact budgets."""

import itertools
import math

import pytest
import torch

from prunekit import WrongInput
from prunekit.data.tokens import TokenBatch
from prunekit.layer.knapsack import Knapsack
from prunekit.plugins.learner import GateProblem, GateQuery
from prunekit.testing.learners import Surface, lesson, mask_of, noisy, problem_of, ranked_space, space_of
from prunekit_strategies.learners.bip import BiP, hypergradient
from prunekit_strategies.learners.domains import Draws, DynamicLoading, RobustLoading, excess, foretold, worst
from prunekit_strategies.learners.dr_pruning import DRPruning
from prunekit_strategies.learners.hard_concrete import drawn, gate, height, opens
from prunekit_strategies.learners.lora_prune import LoRAPrune, progress
from prunekit_strategies.learners.sheared_llama import ShearedLLaMA
from prunekit_strategies.learners.sls import SLS, falling, products


def test_hard_concrete_opens_as_often_as_its_closed_form_says() -> None:
    rng = torch.Generator().manual_seed(0)
    for log_alpha in (-2.0, 0.0, 1.5):
        u = torch.rand(200_000, generator=rng, dtype=torch.float64)
        z = drawn(torch.full_like(u, log_alpha), u)
        chance = float(opens(torch.tensor(log_alpha).double()))
        assert float((z > 0).double().mean()) == pytest.approx(
            chance, abs=4 * math.sqrt(chance * (1 - chance) / len(u))
        )
        assert 0 <= float(z.min()) <= float(z.max()) <= 1
    ends = gate(torch.tensor([-4.6, 0.0, 4.6]).double()).tolist()
    assert ends == pytest.approx([0.004, 0.5, 0.996], abs=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_multipliers_drive_what_is_expected_to_stay_to_the_budget(share: float) -> None:
    space = space_of([3, 5, 2, 6], [3, 1, 3, 1], share)
    price = Knapsack(space).price
    asked: list[GateQuery] = []
    plugin = ShearedLLaMA(steps=160, batch_tokens=8, rate=0.0, mask_rate=0.3, multiplier_rate=0.3, ramp=0.3)
    (decision,) = lesson(
        plugin, problem_of(space), Surface(price / 400, noise=noisy(16, 0)).answer, asked=asked
    ).decisions
    open_ = torch.stack([(query.gates > 0).double() for query in asked[-60:]]).mean(0)
    assert float(open_ @ price) == pytest.approx(space.budget.limit, rel=0.1)
    assert float(mask_of(decision, [3, 5, 2, 6]) @ price) == space.budget.limit
    assert decision.scales is not None
    assert all(float(query.gates.min()) >= 0 and float(query.gates.max()) <= 1 for query in asked)


def test_weights_are_trained_on_the_question_that_the_gates_learn_from() -> None:
    space, asked = space_of([3, 6], [2, 1], 0.5), list[GateQuery]()
    lesson(ShearedLLaMA(steps=10, warmup=0.2), problem_of(space), Surface(torch.ones(9).double()).answer, asked=asked)
    rates = [query.rate for query in asked]
    assert rates == pytest.approx([1e-4 * height((i + 0.5) / 10, 0.2) for i in range(10)])
    assert max(rates) == rates[2]
    assert rates[0] < rates[1] < rates[2] > rates[-1] > 1e-5
    assert all(query.want == {"gradient"} for query in asked)


def test_bip_follows_the_slope_of_the_mask_whose_weights_answer_to_it() -> None:
    rng = torch.Generator().manual_seed(0)
    g, lower = torch.randn(5, generator=rng).double(), torch.randn(5, generator=rng).double()
    half = torch.randn(5, 5, generator=rng).double()
    curved = half @ half.T / 5

    def error(gamma: float, curvature: float) -> float:
        """Largest difference of (2) from finite differences of ℓ(m∘θ*(m)) in a mask, beside the largest slope."""

        def solved(m: torch.Tensor) -> torch.Tensor:
            # ∂/∂θ: m∘(lower + A (m∘θ)) + γ θ = 0
            matrix = curvature * m[:, None] * curved * m[None] + gamma * torch.eye(5).double()
            return torch.linalg.solve(matrix, -m * lower)

        def upper(m: torch.Tensor) -> torch.Tensor:
            z = m * solved(m)
            return g @ z + curvature * z @ curved @ z / 2

        m = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]).double()
        theta = solved(m)
        at, at_lower = g + curvature * curved @ (m * theta), lower + curvature * curved @ (m * theta)
        found = hypergradient(theta * at, m * at * at_lower, gamma)
        exact = torch.stack([
            (upper(m + step) - upper(m - step)) / 2e-6 for step in 1e-6 * torch.eye(5).double()
        ])  # fmt: skip
        return float((found - exact).abs().max() / exact.abs().max())

    assert error(1.0, 0.0) < 1e-8, "without curvature it is exact"
    large, larger = error(100.0, 1.0), error(1000.0, 1.0)
    assert larger < 0.02
    assert larger == pytest.approx(large / 10, rel=0.3), "else off by O(1 / γ)"


def test_bip_alternates_weights_and_mask_on_batches_of_their_own() -> None:
    space, asked = space_of([3, 6], [2, 1], 0.5), list[GateQuery]()
    worth = torch.linspace(0.1, 1, 9, dtype=torch.float64)
    lesson(BiP(steps=4, batch_tokens=32), problem_of(space), Surface(worth).answer, asked=asked)
    assert asked[0].want == {"power"}
    for lower, upper in zip(asked[1::2], asked[2::2], strict=True):
        assert lower.rate > 0
        assert not lower.want
        assert upper.rate == 0
        assert upper.want == {"gradient", "aligned"}
        assert upper.beside == lower.windows
        assert lower.windows is not None
        assert upper.windows is not None
        assert not set(lower.windows) & set(upper.windows)
        assert torch.equal(lower.gates, upper.gates)
        assert float(lower.gates @ Knapsack(space).price) == space.budget.limit


def test_lora_prune_lets_go_along_a_cubic_in_the_price_and_trains_under_the_budget_in_the_end() -> None:
    assert [progress(share, 0.1, 0.1) for share in (0.05, 0.1, 0.5, 0.9, 1.0)] == pytest.approx([0, 0, 0.875, 1, 1])
    space, asked = space_of([4, 16, 4, 16], [10, 3, 10, 3], 0.4), list[GateQuery]()
    price, surface = Knapsack(space).price, Surface(torch.linspace(1, 0.1, 40, dtype=torch.float64))
    plugin = LoRAPrune(steps=40, batch_tokens=8, every=2, cooldown=0.2)
    (decision,) = lesson(plugin, problem_of(space), surface.answer, asked=asked).decisions
    spent = [float(query.gates @ price) for query in asked]
    full = float(price.sum())
    assert spent[:4] == [full] * 4, "nothing goes in the first tenth"
    for step in range(6, 32, 2):
        limit = full - progress(step / 40, 0.1, 0.2) * (full - space.budget.limit)
        assert limit - 10 < spent[step] <= limit
    assert spent[-7:] == [spent[-1]] * 7, "the last set is trained under"
    assert space.budget.limit - 3 < spent[-1] <= space.budget.limit
    assert all(bool((after.gates <= before.gates).all()) for before, after in itertools.pairwise(asked))
    kept = decision.counts
    assert max(k / n for k, n in zip(kept, [4, 16, 4, 16], strict=True)) <= 0.5, "all sites keep about one share"


def test_lora_prune_by_site_keeps_the_best_of_every_site_however_the_sites_compare() -> None:
    sizes = [4, 16, 4, 16]
    space, asked = space_of(sizes, [12, 3, 12, 3], 0.5), list[GateQuery]()
    rng = torch.Generator().manual_seed(2)
    worth = (0.1 + torch.rand(40, generator=rng, dtype=torch.float64)) / 8
    worth[:20] *= 100  # the first two sites are worth far more; shares are those of all the same
    plugin = LoRAPrune(steps=20, batch_tokens=8, every=2)
    (decision,) = lesson(plugin, problem_of(space), Surface(worth).answer, asked=asked).decisions
    shares = [k / n for k, n in zip(decision.counts, sizes, strict=True)]
    assert max(abs(share - 0.5) for share in shares) <= 1 / 4, "half of every site, to a head"
    for kept, part in zip(decision.kept, worth.split(sizes), strict=True):
        best = part.argsort(descending=True)[: len(kept)].sort().values
        assert list(kept) == best.tolist()


def test_sls_keeps_first_ranks_whose_mean_is_the_structure_exactly() -> None:
    space = ranked_space([6, 2, 6, 2], 0.5)
    rng = torch.Generator().manual_seed(0)
    knapsack = Knapsack(space)
    asked: list[GateQuery] = []
    worth = torch.rand(16, generator=rng, dtype=torch.float64) / 8 * knapsack.price
    worth = torch.cat([part.sort(descending=True).values for part in knapsack.split(worth)])
    plugin = SLS(steps=64, batch_tokens=8, score_rate=0.1, penalty=0.5, patience=1)
    (decision,) = lesson(plugin, problem_of(space), Surface(worth, noise=noisy(16, 0)).answer, asked=asked).decisions
    assert space.cost(decision.counts) == space.budget.limit == 32
    assert all(kept == tuple(range(len(kept))) for kept in decision.kept)
    assert len(set(decision.counts)) > 1, "layers differ"
    for query in asked:
        assert all(bool((part.diff() <= 0).all()) and float(part[0]) == 1 for part in knapsack.split(query.gates))
    q = torch.tensor([1.0, 0.8, 1.03, 0.5, 1.0, 1.03, 1.03, 1.03])
    torch.testing.assert_close(products(q, [4, 4])[:4], torch.tensor([1.0, 0.8, 0.824, 0.412]))
    torch.testing.assert_close(falling(products(q, [4, 4]), [4, 4])[:4], torch.tensor([1.0, 0.8, 0.8, 0.412]))


def test_the_worst_shares_are_the_optimum_of_their_problem() -> None:
    p, above = [0.5, 0.3, 0.2], [1.0, 2.0, 1.5]
    assert worst(p, above, 0.0) == pytest.approx(p)
    assert worst(p, [0.7] * 3, 0.1) == pytest.approx(p)
    small = torch.tensor(worst(p, above, 1e-3), dtype=torch.float64)
    base, high = torch.tensor(p).double(), torch.tensor(above).double()
    mean = float(base @ high)
    interior = base * (1 + math.sqrt(2e-3) * (high - mean) / float((base * (high - mean).square()).sum().sqrt()))
    torch.testing.assert_close(small, interior, rtol=1e-6, atol=1e-9)
    rho, least = 0.3, 0.2
    found = torch.tensor(worst(p, above, rho, least), dtype=torch.float64)
    side = torch.linspace(0, 1, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    near = (0.5 * (base * (grid / base - 1).square()).sum(1) <= rho) & (grid >= least * base - 1e-9).all(1)
    assert 0.5 * float((base * (found / base - 1).square()).sum()) == pytest.approx(rho, abs=1e-6)
    assert float(found @ high) >= float((grid[near] @ high).max()) - 0.02
    assert float(found.sum()) == pytest.approx(1)


def test_references_are_lowered_until_one_loss_is_above() -> None:
    assert excess([3.0, 4.0], [2.5, 4.5]) == pytest.approx([0.5, -0.5])
    assert excess([3.0, 4.0], [5.0, 5.0]) == pytest.approx([3 - 4, 4 - 4])


def test_a_curve_that_is_one_is_foretold() -> None:
    t = torch.linspace(0.05, 0.6, 12, dtype=torch.float64)
    at = torch.stack([t, 1 - t / 2], 1)
    losses = 0.4 * t**-0.5 * at[:, 1] ** -0.3 + 2
    assert foretold(at, losses, (1.0, 0.5)) == pytest.approx(0.4 * 0.5**-0.3 + 2, abs=0.03)


def test_dynamic_loading_follows_the_rise_over_the_reference() -> None:
    loading = DynamicLoading([2.0, 3.0], [0.5, 0.5], smoothing=0.0)
    loading.heard([2.5, 3.0], 0.1, 1.0)
    assert loading.weights[0] / loading.weights[1] == pytest.approx(math.exp(0.5))
    loading.heard([2.0, 3.0], 0.2, 1.0)
    assert loading.weights[0] / loading.weights[1] == pytest.approx(math.exp(0.5)), "at its reference nothing moves"


def test_robust_loading_turns_to_the_data_set_that_lost_most_and_its_mixture_follows() -> None:
    loading = RobustLoading([2.0, 2.0], [0.5, 0.5], 0.5, fit=False)
    loading.heard([2.1, 3.0], 0.1, 0.9)
    assert loading.weights[1] > 0.6
    assert loading.base == [0.5, 0.5], "the mixture stays in the first fifth"
    for _ in range(100):
        loading.heard([2.1, 3.0], 0.5, 0.6)
    assert 0.5 < loading.base[1] <= 0.81
    fitted = RobustLoading([2.0, 2.0], [0.5, 0.5], 0.5)
    for i in range(12):
        fitted.heard([3.0 - i / 20, 4.0 - i / 20], (i + 1) / 20, 1 - i / 40)
    assert fitted.reference[0] <= 3.0 - 11 / 20


@pytest.mark.parametrize("plugin", [DRPruning(steps=40, fit=False), ShearedLLaMA(steps=40, loading="dynamic")])
def test_windows_are_drawn_by_the_shares_of_data_sets(plugin: DRPruning | ShearedLLaMA) -> None:
    space, asked = space_of([3, 6], [2, 1], 0.5), list[GateQuery]()
    sources = tuple(int(i >= 40) for i in range(64))
    problem = GateProblem((space,), 64, 256, sources=sources)
    surface = Surface(torch.linspace(0.1, 1, 9, dtype=torch.float64))

    def answer(query: GateQuery):  # type: ignore[no-untyped-def]  # the second data set loses more under gates
        reply = surface.answer(query)
        far = 3.0 * float((1 - query.gates).mean())
        windows = query.windows or ()
        losses = torch.tensor([2.0 + far * sources[i] for i in windows], dtype=torch.float64)
        return type(reply)(reply.loss, reply.gradient, windows=losses)

    lesson(plugin, problem, answer, asked=asked)
    assert asked[0].rate == 0
    assert sorted(sources[i] for i in asked[0].windows or ()) == [0] * 16 + [1] * 16, "both are compared with"
    late = [sources[i] for query in asked[-20:] for i in query.windows or ()]
    assert sum(late) / len(late) > 0.6


def test_who_weighs_data_sets_asks_for_several() -> None:
    with pytest.raises(WrongInput, match="give several in data"):
        DRPruning().check(TokenBatch(torch.zeros(2, 8, dtype=torch.long), "one"))
    with pytest.raises(WrongInput, match=r"give several in data\.search_dataset, or loading constant"):
        ShearedLLaMA(loading="dynamic").check(TokenBatch(torch.zeros(2, 8, dtype=torch.long), "one"))
    ShearedLLaMA().check(TokenBatch(torch.zeros(2, 8, dtype=torch.long), "one"))
    for plugin in (DRPruning(), ShearedLLaMA(loading="dynamic")):
        plugin.check(TokenBatch(torch.zeros(2, 8, dtype=torch.long), "a+b", ("a", "b")))


def test_draws_give_every_window_its_turn() -> None:
    problem = GateProblem((space_of([3, 6], [2, 1], 0.5),), 6, 8, sources=(0, 0, 0, 1, 1, 1))
    draws = Draws(problem, torch.Generator().manual_seed(0))
    assert sorted(draws.draw([1.0, 0.0], 6)) == [0, 0, 1, 1, 2, 2]
    assert draws.even(3) == (0, 3, 1)
    draws.heard((0, 3), torch.tensor([1.0, 2.0]))
    draws.heard((0, 0), torch.tensor([2.0, 4.0]))
    assert draws.lost == pytest.approx([0.9 + 0.3, 2.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShearedLLaMA(steps=0),
        lambda: DRPruning(rho=-1.0),
        lambda: LoRAPrune(rank=0),
        lambda: LoRAPrune(warmup=0.6, cooldown=0.6),
        lambda: BiP(gamma=0.0),
        lambda: SLS(growth=1.0),
    ],
)
def test_options_that_cannot_be_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"at least|above|leave no step"):
        make()  # type: ignore[operator]
