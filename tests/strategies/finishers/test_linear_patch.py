"""A linear map of low rank beside the MLP: the best of its rank, what the released code computes, and what it costs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunekit.calibration.twin import Twin
from prunekit.errors import WrongInput
from prunekit.models.adapters.find import adapter_for
from prunekit.testing import toy_supernet, toy_workpiece
from prunekit_strategies.finishers.linear_patch import TOKENS, LinearPatch, Pairs


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """Inputs (60, 7) that know of each other and outputs (60, 5) that are nearly linear in them; tokens first."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(60, 7) @ normal(7, 7) + normal(7)
    return x, (x @ normal(7, 5)).tanh() * torch.tensor([1.0, 3.0, 0.2, 1.0, 2.0]) + 0.3 * normal(60, 5)


def moments(x: Tensor, e: Tensor) -> Pairs:
    return Pairs.over([(x[:40], e[:40], 1.0), (x[40:], e[40:], 1.0)])  # in two chunks


def damped(x: Tensor, damping: float) -> tuple[Tensor, float]:
    """(XᵀX + ridge, ridge) as the released code has them: not of means, at so many tokens the more of it."""
    sums = x.T @ x
    ridge = damping * float(sums.diagonal().mean()) / (len(x) / TOKENS)
    return sums + ridge * torch.eye(len(sums), dtype=sums.dtype), ridge


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_the_optimal_patch_loses_the_tail_and_no_other_of_its_rank_loses_less(
    drawn: tuple[Tensor, Tensor], rank: int
) -> None:
    """‖E - X P‖² + λ‖P‖² = ‖E‖² - Σ σ² of the head of H^½ W, W the ridge solution; Eckart and Young."""
    (x, e), damping = drawn, 1e-3
    pairs = moments(x, e)
    hessian, ridge = damped(x, damping)
    whole = torch.linalg.solve(hessian, x.T @ e)  # (d, d_out)
    values, vectors = torch.linalg.eigh(hessian)
    root = vectors * values.sqrt() @ vectors.T
    u, s, v = torch.linalg.svd(root @ whole, full_matrices=False)
    best = torch.linalg.solve(root, u[:, :rank] * s[:rank] @ v[:rank])

    def objective(p: Tensor) -> float:
        return float((e - x @ p).square().sum() + ridge * p.square().sum())

    left, right = pairs.factors(damping, rank, "optimal")
    assert left.shape == (5, rank)
    assert right.shape == (rank, 7)
    torch.testing.assert_close((left @ right).T, best)
    assert objective((left @ right).T) == pytest.approx(float(e.square().sum() - s[:rank].square().sum()), rel=1e-10)
    assert pairs.error(left @ right) == pytest.approx(float((e - x @ (left @ right).T).square().sum()) / 60, rel=1e-10)
    released = pairs.factors(damping, rank, "released")
    assert objective((left @ right).T) <= objective((released[0] @ released[1]).T) + 1e-9
    if rank == 5:
        torch.testing.assert_close((left @ right).T, whole)  # nothing is truncated
        torch.testing.assert_close((released[0] @ released[1]).T, whole)


def test_the_released_truncation_is_what_the_paper_computes_from_the_tokens(drawn: tuple[Tensor, Tensor]) -> None:
    (x, e), damping, rank = drawn, 1e-3, 2
    hessian, _ = damped(x, damping)
    whole = torch.linalg.solve(hessian, x.T @ e)
    found = x @ whole
    rho = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(found.T, e.T, strict=True)])
    torch.testing.assert_close(moments(x, e).correlations(moments(x, e).ridge(damping)), rho)
    weights = torch.sigmoid((rho - rho.mean()) / 0.05)
    assert weights.max() > 2 * weights.min()  # so that they matter
    u, s, v = torch.linalg.svd(whole * weights)
    left, right = moments(x, e).factors(damping, rank, "released")
    torch.testing.assert_close((left @ right).T, u[:, :rank] * s[:rank] @ (v[:rank] / weights))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))  # neither factor is large in half precision


def test_outputs_that_do_not_vary_have_no_correlation(drawn: tuple[Tensor, Tensor]) -> None:
    x, e = drawn
    e = torch.cat([e[:, :4], torch.zeros(60, 1, dtype=torch.float64)], dim=1)
    pairs = moments(x, e)
    assert float(pairs.correlations(pairs.ridge(1e-3))[4]) == 0
    for truncate in ("optimal", "released"):
        left, right = pairs.factors(1e-3, 5, truncate)
        assert torch.isfinite(left @ right).all()
        assert float((left @ right)[4].abs().max()) < 1e-9


SURE = {"damping": 1e-6, "rank": 0.2, "layers": 2}


@pytest.mark.parametrize("truncate", ["optimal", "released"])
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_an_mlp_with_a_map_gives_its_old_output_and_that_of_the_map(family: str, truncate: str) -> None:
    piece = toy_workpiece(toy_supernet(family))
    before = {here.site.name: here.made(0) for here in Twin(piece, piece.tokens)}  # the first MLP is behind nothing new
    finisher = LinearPatch(truncate=truncate, **SURE)  # type: ignore[arg-type]
    said = finisher.finish(piece)
    assert said["parameters_added"] == finisher.reserved(piece.sites) == 2 * 2 * 4 * 24
    assert list(said["errors"]) == [site.name for site in piece.sites if site.kind == "mlp"][:2]
    block = piece.adapter.blocks(piece.model)[0]
    for here in Twin(piece, piece.tokens):
        if here.site.block == 0 and here.site.kind == "mlp":
            x, patch = here.entering(0), here.patch
            assert patch is not None
            assert torch.equal(here.made(0), before[here.site.name] + patch(x))
            assert torch.equal(block.get_submodule("mlp")(x), here.made(0))
        if (found := said["errors"].get(here.site.name)) is not None:
            wanted = here.wanted(0, "own")
            left = (wanted - here.made(0)).square().sum() / wanted.square().sum()
            assert found[1] == pytest.approx(float(left), rel=1e-6)  # what the sums promise is what the model does
            if truncate == "optimal":
                assert found[1] < found[0]


def test_with_a_large_ridge_nothing_gets_worse() -> None:
    piece = toy_workpiece()
    said = LinearPatch(layers=2).finish(piece)  # 48 tokens: λ is 171 times the mean of diag H
    assert all(after <= before for before, after in said["errors"].values())


def test_the_mlps_nearest_to_linear_get_the_maps_and_the_last_never_does() -> None:
    net = toy_supernet(num_hidden_layers=4)
    piece = toy_workpiece(net)
    names = [site.name for site in piece.sites if site.kind == "mlp"]
    linear = dict[str, float]()
    with torch.no_grad():
        piece.adapter.maps(piece.adapter.blocks(piece.dense)[1], piece.sites[3])[0].weight.zero_()  # it gives nothing
        for here in Twin(piece, piece.tokens):
            if here.site.kind == "mlp":
                first = piece.adapter.maps(here.dense_block, here.site)[0]
                x = here.twin.dense.caught(first, here.dense_block, here.site, 0).flatten(0, -2)
                y = here.wanted(0, "dense").flatten(0, -2)
                found = x @ torch.linalg.solve(damped(x, 1e-4)[0], x.T @ y)
                pairs = zip(found.T, y.T, strict=True)
                rho = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).nan_to_num(0)
                linear[here.site.name] = float(rho.mean())
        chosen = LinearPatch(layers=2, damping=1e-4)._chosen(piece)
    order = sorted(names[:-1], key=lambda name: -linear[name])
    assert chosen == set(order[:2])
    assert names[1] not in chosen
    assert LinearPatch(layers=9)._chosen(piece) == set(names[:-1])
    whole = toy_workpiece(net, plan=(3, 17, *(site.n_groups // 2 for site in net.space.sites[2:])))
    assert LinearPatch(layers=9)._chosen(whole) == set(names[1:-1])  # the first gives what it should
    assert LinearPatch(layers=9, aim="stream")._chosen(whole) == set(names[:-1])


def test_dropped_mlps_get_none_and_the_price_is_at_most_what_was_set_aside() -> None:
    net = toy_supernet()
    piece = toy_workpiece(net, plan=(3, 0, 3, 9, 3, 9))
    finisher = LinearPatch(**SURE)  # type: ignore[arg-type]
    said = finisher.finish(piece)
    assert list(said["errors"]) == [piece.sites[3].name]
    assert 2 * said["parameters_added"] == finisher.reserved(piece.sites)


def test_the_price_follows_from_the_sites_alone() -> None:
    sites = toy_supernet().space.sites  # three MLPs of 24 outputs
    assert LinearPatch().reserved(sites) == 2 * 2 * 24  # a rank of at least 1, and not in the last block
    assert LinearPatch(layers=1, rank=0.13).reserved(sites) == 2 * 3 * 24
    assert LinearPatch(rank=0.03).rank_of(4096) == 122  # as the released code rounds
    assert LinearPatch().reserved(tuple(site for site in sites if site.kind == "attention")) == 0
    assert LinearPatch().reserved(sites[:2]) == 0  # the only MLP is in the last block
    spared = (sites[0], replace(sites[1], spared=True), *sites[2:])
    assert LinearPatch().reserved(spared) == 2 * 24


def test_families_whose_mlp_is_no_module_are_refused() -> None:
    with pytest.raises(WrongInput, match="has no class with one; take least-squares or reconstruction"):
        LinearPatch().check(adapter_for("opt"))
    assert adapter_for("llama").patches
    for wrong in ({"layers": 0}, {"rank": 0.0}, {"damping": 0.0}, {"truncate": "best"}):
        with pytest.raises(ValueError, match=r"rank|truncate"):
            replace(LinearPatch(), **wrong)  # type: ignore[arg-type]
