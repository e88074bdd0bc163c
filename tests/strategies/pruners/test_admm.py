import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.admm import ADMM, alternate, relaxed
from prunekit_strategies.pruners.obs import OBS
from prunekit_strategies.pruners.score import Wanda


def correlated(size: int = 1, seed: int = 0) -> LayerProblem:
    """48 input columns, of which 16 would nearly do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 16, generator=generator) @ torch.randn(16, 48, generator=generator)
    x = (x + torch.randn(500, 48, generator=generator)) * torch.randn(48, generator=generator).exp()
    return LayerProblem(torch.randn(24, 48, generator=generator), x.T @ x / 500, group_size=size)


@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_on_a_fixed_mask_the_rounds_converge_to_the_refit(share: float) -> None:
    layer = toy_layer(8, dtype=torch.float64, moments=torch.float64)
    layer = replace(layer, damping=0.1)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)[None, None]
    eigen = torch.linalg.eigh(layer.hessian)
    rhos = [share * float(eigen.eigenvalues[-1])] * 3000
    w, last = alternate(layer.weight, layer.hessian, eigen, rhos, mask=mask, choose=lambda _: mask)
    torch.testing.assert_close(w[0], layer.refitted([0, 2, 3, 6]).weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(last, mask)


def test_growing_rho_does_not_move_the_fixed_point() -> None:
    layer = toy_layer(8, dtype=torch.float64, moments=torch.float64)
    layer = replace(layer, damping=0.1)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)[None, None]
    eigen = torch.linalg.eigh(layer.hessian)
    largest = float(eigen.eigenvalues[-1])
    before, _ = alternate(layer.weight, layer.hessian, eigen, [largest] * 3000, mask=mask, choose=lambda _: mask)
    grown = [largest] * 3000 + [2 * largest, 8 * largest]
    after, _ = alternate(layer.weight, layer.hessian, eigen, grown, mask=mask, choose=lambda _: mask)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4])
def test_beats_wanda_clearly_refitted_too_and_comes_near_obs(size: int) -> None:
    layers = [correlated(size, seed) for seed in range(4)]
    admm, wanda, fitted, obs = (
        sum(layer.error(c.weight) for layer in layers for c in pruner.prune(layer, [24 // size, 12 // size]))
        for pruner in (ADMM(), Wanda(), Wanda(refit=True), OBS())
    )
    assert admm < 0.5 * wanda
    assert admm < fitted
    assert admm < 1.1 * obs


def test_rounds_improve_on_the_first_mask() -> None:
    layers = [correlated(seed=seed) for seed in range(4)]
    first, last = (
        sum(layer.error(c.weight) for layer in layers for c in pruner.prune(layer, [24, 12]))
        for pruner in (ADMM(iterations=0), ADMM())
    )
    assert last < first


@pytest.mark.parametrize("start", ["compensated", "output"])
def test_first_mask_follows_its_formula(start: str) -> None:
    layer = correlated()
    candidate = ADMM(iterations=0, start=start).prune(layer, [20])[0]  # type: ignore[arg-type]
    price = layer.weight.double().square().sum(0)
    if start == "compensated":  # D cancels: ‖w_j‖² H_jj / (A⁻¹)_jj = ‖w_j‖² / (H⁻¹)_jj
        price = price / torch.linalg.inv(layer.hessian).diagonal()
    else:
        price = price * layer.hessian.diagonal()
    assert candidate.kept == tuple(sorted(price.topk(20).indices.tolist()))
    torch.testing.assert_close(ADMM(start=start).scores(layer), price)  # type: ignore[arg-type]


def quadratic(layer: LayerProblem) -> Tensor:
    """Q of qᵀQq, the error of masking the groups with q = 1."""
    weight = layer.weight.double()
    pairs = ((weight.T @ weight) * layer.hessian).unflatten(0, (layer.n_groups, -1)).unflatten(2, (layer.n_groups, -1))
    return pairs.sum((1, 3))


@pytest.mark.parametrize("size", [1, 4])
def test_the_error_of_masking_is_quadratic_and_the_refit_is_below_it(size: int) -> None:
    layer = replace(correlated(size), damping=0)
    whole = float(((layer.weight @ layer.gram) * layer.weight).sum())
    for candidate in ADMM(start="relaxed").prune(layer, [24 // size, 12 // size]):
        kept = candidate.kept or ()
        q = torch.ones(layer.n_groups, dtype=torch.float64).index_fill(0, torch.tensor(kept), 0)
        masked = layer.error(layer.masked(kept).weight)
        assert float(q @ quadratic(layer) @ q) / whole == pytest.approx(masked, rel=1e-4)
        assert layer.error(candidate.weight) <= masked


def test_inside_its_bounds_the_relaxed_mask_is_the_closed_form() -> None:
    q = torch.eye(8, dtype=torch.float64) + 0.1 * torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).double()
    q = q @ q.T
    solved = torch.linalg.solve(q, torch.ones(8, dtype=torch.float64))
    mask = relaxed(q, 3)
    torch.testing.assert_close(mask, 3 * solved / solved.sum(), rtol=1e-6, atol=0)
    assert float(mask @ q @ mask) == pytest.approx(9 / float(solved.sum()), rel=1e-6)


@pytest.mark.parametrize("total", [1, 3, 6, 9])
@pytest.mark.parametrize("size", [1, 4])
def test_the_relaxed_mask_is_optimal_and_below_every_binary_one(size: int, total: int) -> None:
    generator = torch.Generator().manual_seed(total)
    layer = replace(correlated(4, total), group_size=size)
    q = quadratic(layer)[:10, :10] if size == 1 else quadratic(layer)
    n = len(q)
    mask = relaxed(q, total)
    assert float(mask.sum()) == pytest.approx(total)
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1
    least = float(mask @ q @ mask)
    for gone in itertools.combinations(range(n), total):
        assert least <= float(q[list(gone)][:, list(gone)].sum()) * (1 + 1e-6)
    for _ in range(200):  # no feasible move lowers it
        i, j = torch.randint(n, (2,), generator=generator).tolist()
        step = min(float(mask[i]), 1 - float(mask[j]), 1e-3)
        moved = mask.clone()
        moved[i] -= step
        moved[j] += step
        assert float(moved @ q @ moved) >= least * (1 - 1e-7)


def test_the_relaxed_mask_starts_the_rounds() -> None:
    layer = correlated()
    (candidate,) = ADMM(iterations=0, start="relaxed").prune(layer, [20])
    mask = relaxed(quadratic(layer), 28)
    assert candidate.kept == tuple(sorted(mask.argsort()[:20].tolist()))


def test_weights_are_the_refit_of_the_kept_groups() -> None:
    layer = correlated(4)
    for candidate in ADMM().prune(layer, [3, 6, 9]):
        assert torch.equal(candidate.weight, layer.refitted(candidate.kept or ()).weight)


def test_counts_are_exact_on_ties_and_the_lower_id_is_the_first_choice() -> None:
    tied = LayerProblem(torch.ones(2, 5), torch.eye(5))
    assert [len(c.kept or ()) for c in ADMM().prune(tied, range(6))] == list(range(6))
    first = ADMM(iterations=0, start="output").prune(tied, range(6))
    assert [c.kept for c in first] == [tuple(range(k)) for k in range(6)]
