"""Eckart and Young in the norm of the inputs, and the price of every rank in closed form."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem, LocalPruner
from prunekit.space.forms import RANKS
from prunekit.testing.layers import Quirk, few_tokens, toy_layer
from prunekit_strategies.pruners.asvd import ASVD, MeanAbsolute
from prunekit_strategies.pruners.svd_llm import SVDLLM

PRUNERS: list[LocalPruner] = [SVDLLM(), ASVD(), ASVD(alpha=0)]


def exact(n: int = 7, d_out: int = 9, damping: float = 0.01, **options: object) -> LayerProblem:
    """A layer in float64, for what holds exactly."""
    double = {"dtype": torch.float64, "moments": torch.float64, "needs": {MeanAbsolute()}}
    return replace(toy_layer(n, 1, d_out, form=RANKS, **double, **options), damping=damping)  # type: ignore[arg-type]


def rooted(gram: Tensor) -> Tensor:
    """The symmetric square root, which a singular matrix has too."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def lost(layer: LayerProblem, weight: Tensor) -> float:
    """E‖(W - Ŵ) x̂‖²."""
    gone = layer.weight - weight
    return float(((gone @ layer.gram) * gone).sum())


def descended(layer: LayerProblem, rank: int, seed: int, steps: int = 60) -> float:
    """The least E‖(W - U V) x̂‖² that alternating least squares find from a random start: brute force."""
    left = torch.randn(len(layer.weight), rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    right = left.T @ layer.weight
    for _ in range(steps):
        right = torch.linalg.lstsq(left, layer.weight).solution
        made = right @ layer.gram
        left = torch.linalg.lstsq(made @ right.T, made @ layer.weight.T).solution.T
    return lost(layer, left @ right)


@pytest.mark.parametrize(("shape", "seed"), [((6, 8), 0), ((8, 4), 1), ((5, 5), 2)])
def test_no_factors_of_the_rank_lose_less_and_what_is_lost_are_the_singular_values_behind_it(seed, shape):
    layer = exact(*shape, damping=1e-12, seed=seed)
    squares = torch.linalg.svdvals(layer.weight @ rooted(layer.gram)).square()
    for rank, found in enumerate(SVDLLM().prune(layer, range(1, layer.most)), 1):
        tail = float(squares[rank:].sum())
        assert lost(layer, found.weight) == pytest.approx(tail, rel=1e-6)
        for start in range(2):
            assert descended(layer, rank, start) >= tail * (1 - 1e-9)
    assert descended(layer, 1, 0) == pytest.approx(float(squares[1:].sum()), rel=1e-4), "the search is no straw man"


@pytest.mark.parametrize("quirk", ["plain", "dead", "duplicate", "low rank", "zero weight", "loud", "silent"])
@pytest.mark.parametrize("pruner", PRUNERS, ids=["svd-llm", "asvd", "svd"])
def test_the_price_of_every_rank_is_what_it_loses_whatever_the_ridge(pruner: LocalPruner, quirk: Quirk) -> None:
    for damping in (0.0, 0.01, 1.0):
        layer = exact(quirk=quirk, damping=damping)
        nested = pruner.nested(layer)
        assert nested is not None
        counts = list(range(1, layer.most + 1))
        told, seen = layer.errors(nested)[counts], [layer.error(c.weight) for c in pruner.prune(layer, counts)]
        assert told.tolist() == pytest.approx(seen, rel=1e-9, abs=1e-9)
        assert told[-1] == 0
        assert bool((told.diff() <= 0).all()), "more rank never loses more"


@pytest.mark.parametrize("pruner", PRUNERS, ids=["svd-llm", "asvd", "svd"])
def test_the_price_in_nats_is_what_the_candidate_costs(pruner: LocalPruner) -> None:
    layer = exact(9, 6)
    slope = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root = torch.linalg.cholesky(slope.T @ slope / 20).T
    nested, counts = pruner.nested(layer), list(range(1, layer.most + 1))
    assert nested is not None
    seen = [layer.nats(found.weight, root) for found in pruner.prune(layer, counts)]
    assert nested.nats(root)[counts].tolist() == pytest.approx(seen, rel=1e-9, abs=1e-12)


def test_the_first_form_with_an_inverse_is_the_second_without() -> None:
    layer = exact()
    factor = torch.linalg.cholesky(layer.hessian)
    u, s, vt = torch.linalg.svd(layer.weight @ factor, full_matrices=False)
    for rank, found in enumerate(SVDLLM().prune(layer, range(1, layer.most)), 1):
        published = u[:, :rank] * s[:rank] @ vt[:rank] @ torch.linalg.inv(factor)
        torch.testing.assert_close(found.weight, published, rtol=1e-9, atol=1e-9)


def test_where_inputs_have_fewer_directions_than_the_rank_nothing_is_lost() -> None:
    low = exact(9, 9, damping=1e-9, quirk="low rank")  # two directions
    few = few_tokens(9, 9, 3, dtype=torch.float64)
    few = replace(few, gram=few.gram.double(), damping=1e-9)
    for layer, directions in ((low, 2), (few, 3)):
        errors = [layer.error(found.weight) for found in SVDLLM().prune(layer, range(1, layer.most))]
        assert errors[directions - 1] < 1e-6 < errors[directions - 2]


def test_a_dead_input_costs_no_rank() -> None:
    layer = exact(8, 8, damping=1e-10, quirk="dead")
    loud = layer.weight.clone()
    loud[:, 0] *= 1e3  # what it would do nobody sees
    plain, other = (SVDLLM().prune(it, [2])[0] for it in (layer, replace(layer, weight=loud)))
    torch.testing.assert_close(plain.weight[:, 1:], other.weight[:, 1:], rtol=1e-3, atol=1e-3)


def test_equal_singular_values_lose_the_same_whichever_stays() -> None:
    layer = replace(exact(6, 6), weight=torch.eye(6, dtype=torch.float64), gram=torch.eye(6, dtype=torch.float64))
    again = SVDLLM().prune(layer, [1, 2])
    for rank, found in zip((1, 2), SVDLLM().prune(layer, [1, 2]), strict=True):
        assert layer.error(found.weight) == pytest.approx((6 - rank) / 6)
        assert torch.equal(found.weight, again[rank - 1].weight)


def test_both_factors_have_rows_of_equal_norms_so_that_half_precision_holds_them() -> None:
    for found in SVDLLM().prune(exact(), [1, 2, 3]):
        assert found.factors is not None
        left, right = found.factors
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_whitening_is_worth_more_than_scaling_and_scaling_more_than_nothing() -> None:
    """On inputs that are correlated and of very different size, at every rank, as both papers claim."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) @ torch.randn(6, 24, generator=generator)
    x = (x + 0.3 * torch.randn(400, 24, generator=generator)) * torch.randn(24, generator=generator).exp()
    layer = LayerProblem(
        torch.randn(24, 24, generator=generator), x.T @ x / 400, form=RANKS, damping=1e-6,
        statistics={"mean-absolute": x.abs().mean(0)},
    )  # fmt: skip
    errors = [[layer.error(c.weight) for c in pruner.prune(layer, range(1, 12))] for pruner in PRUNERS]
    assert all(white <= scaled <= plain for white, scaled, plain in zip(*errors, strict=True))
    assert sum(errors[0]) < 0.7 * sum(errors[1]) < 0.7 * sum(errors[2])


def test_alpha_zero_is_the_plain_decomposition_and_alpha_one_scales_by_the_mean_absolute_input() -> None:
    layer = exact()
    scale = layer.require(MeanAbsolute())
    for alpha in (0, 1):
        s = scale**alpha
        u, d, vt = torch.linalg.svd(layer.weight * s, full_matrices=False)
        (found,) = ASVD(alpha=alpha).prune(layer, [2])
        torch.testing.assert_close(found.weight, u[:, :2] * d[:2] @ vt[:2] / s, rtol=1e-9, atol=1e-9)


def test_the_mean_absolute_input_is_over_tokens() -> None:
    x = torch.randn(11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = {"sum": torch.zeros(4, dtype=torch.float64)}
    make: Callable[..., object] = type("Seen", (), {"inputs": x})
    MeanAbsolute().add(sums, make())  # type: ignore[arg-type]
    torch.testing.assert_close(sums["sum"] / 11, x.abs().mean(0))
