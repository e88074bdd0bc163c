from dataclasses import replace

import pytest
import torch

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.admm import ADMM, alternate
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


def test_weights_are_the_refit_of_the_kept_groups() -> None:
    layer = correlated(4)
    for candidate in ADMM().prune(layer, [3, 6, 9]):
        assert torch.equal(candidate.weight, layer.refitted(candidate.kept or ()).weight)


def test_a_count_has_one_answer_whatever_else_is_asked() -> None:
    layer = correlated()
    every = ADMM().prune(layer, [36, 24, 12])
    alone = [ADMM().prune(layer, [keep])[0] for keep in (36, 24, 12)]
    assert [c.kept for c in every] == [c.kept for c in alone]


def test_counts_are_exact_on_ties_and_the_lower_id_is_the_first_choice() -> None:
    tied = LayerProblem(torch.ones(2, 5), torch.eye(5))
    assert [len(c.kept or ()) for c in ADMM().prune(tied, range(6))] == list(range(6))
    first = ADMM(iterations=0, start="output").prune(tied, range(6))
    assert [c.kept for c in first] == [tuple(range(k)) for k in range(6)]


@pytest.mark.parametrize("options", [{"iterations": -1}, {"rho": 0.0}, {"first_rho": 2.0}, {"start": "random"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"iterations|start"):
        ADMM(**options)  # type: ignore[arg-type]
