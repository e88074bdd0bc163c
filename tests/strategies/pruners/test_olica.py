"""Olica inside heads: the bases of values and their best truncation, and low rank by the size of inputs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem
from prunekit.layer.candidates import narrow_product
from prunekit.space.forms import RANKS, Values
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.olica import Olica
from prunekit_strategies.pruners.svd_llm import SVDLLM

OWN, SHARED = Values(3, 3), Values(4, 2)  # heads of 4 values each
DOUBLE = {"dtype": torch.float64, "moments": torch.float64}


def exact(form: Values, d_out: int = 7, damping: float = 1e-12) -> LayerProblem:
    """A map behind attention in float64, for what holds exactly."""
    return replace(toy_layer(4 * form.heads, 1, d_out, form=form, **DOUBLE), damping=damping)  # type: ignore[arg-type]


def alike(layer: LayerProblem) -> LayerProblem:
    """The same, with one second moment in all its heads, which do not know of each other."""
    return replace(layer, gram=torch.block_diag(*[layer.gram[:4, :4]] * (layer.d_in // 4)))


def rooted(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def lost(layer: LayerProblem, weight: Tensor, heads: slice) -> float:
    """Σ_h E‖(O_h - U_h B) a‖² over some neighbouring heads, each by itself."""
    gone = (layer.weight - weight).unflatten(1, (-1, 4))[:, heads]
    blocks = [layer.gram[i : i + 4, i : i + 4] for i in range(4 * heads.start, 4 * heads.stop, 4)]
    return sum(float(((each @ block) * each).sum()) for each, block in zip(gone.unbind(1), blocks, strict=True))


def descended(stacked: Tensor, gram: Tensor, rank: int, seed: int, steps: int = 60) -> float:
    """The least E‖(O - U B) a‖² that alternating least squares find from a random start: brute force."""
    left = torch.randn(len(stacked), rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    right = left.T @ stacked
    for _ in range(steps):
        right = torch.linalg.lstsq(left, stacked).solution
        made = right @ gram
        left = torch.linalg.lstsq(made @ right.T, made @ stacked.T).solution.T
    gone = stacked - left @ right
    return float(((gone @ gram) * gone).sum())


@pytest.mark.parametrize("truncate", ["released", "optimal"])
@pytest.mark.parametrize("form", [OWN, SHARED])
def test_all_directions_of_a_basis_are_the_head_as_it_was(form, truncate):
    layer = exact(form, damping=0.01)
    bases, shares = Olica(truncate=truncate).bases(layer)
    whole = narrow_product(shares.movedim(2, 0).flatten(1), bases.flatten(0, 1), form.heads)
    torch.testing.assert_close(whole, layer.weight, rtol=0, atol=1e-11)
    if truncate == "released":  # a rotation
        torch.testing.assert_close(bases @ bases.mT, torch.eye(4).double().expand_as(bases), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("form", "each"), [(OWN, 1), (SHARED, 2)])
def test_no_narrower_values_lose_less_and_what_is_lost_are_the_singular_values_behind_them(form, each):
    layer, stacked, gram, tail = exact(form) if each == 1 else alike(exact(form)), torch.empty(0), torch.empty(0), 0.0
    for rank, found in enumerate(Olica(truncate="optimal").prune(layer, [1, 2, 3]), 1):
        for head in range(0, form.heads, each):
            stacked = layer.weight.unflatten(1, (-1, 4))[:, head : head + each].movedim(1, 0).flatten(0, 1)
            gram = layer.gram[4 * head : 4 * head + 4, 4 * head : 4 * head + 4]
            tail = float(torch.linalg.svdvals(stacked @ rooted(gram)).square()[rank:].sum())
            assert lost(layer, found.weight, slice(head, head + each)) == pytest.approx(tail, rel=1e-6)
            assert descended(stacked, gram, rank, seed=0) >= tail * (1 - 1e-9)
    assert descended(stacked, gram, 3, seed=1) == pytest.approx(tail, rel=1e-3), "the search is no straw man"


def test_heads_that_share_values_read_one_basis():
    (found,) = Olica(truncate="optimal").prune(exact(SHARED), [2])
    for pair in found.weight.unflatten(1, (2, 2, 4)).unbind(1):
        assert int(torch.linalg.matrix_rank(pair.movedim(1, 0).flatten(0, 1), rtol=1e-9)) == 2


def test_the_released_basis_is_that_of_the_paper_with_its_scores():
    """The released code, one query head to each KV head: the singular vectors of the map that reads, scaled by its
    outputs; then the norms of rows and columns in the basis that is turned, weighed by what they receive."""
    layer = exact(OWN)
    (values,) = layer.producers
    power = ((layer.weight @ layer.gram) * layer.weight).sum(1)
    for keep in (1, 2, 3):
        (found,) = Olica().prune(layer, [keep])
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            reads, makes = layer.weight[:, own], values.weight[own]
            turn, sizes, rest = torch.linalg.svd((reads * power.sqrt()[:, None]).T, full_matrices=False)
            reading, making = (sizes[:, None] * rest / power.sqrt()).T, turn.T @ makes
            torch.testing.assert_close(reading @ making, reads @ makes)  # nothing has changed
            received = (turn.T @ layer.gram[own, own] @ turn).diagonal()
            score = (making * values.require("power").sqrt()).norm(dim=1) + (reading * received.sqrt()).norm(dim=0)
            stays = score.argsort(descending=True)[:keep]
            torch.testing.assert_close(found.weight[:, own] @ makes, reading[:, stays] @ making[stays])


def test_queries_and_keys_are_truncated_as_the_paper_does_or_as_is_best():
    layer = replace(toy_layer(8, 1, 6, form=RANKS, **DOUBLE), damping=1e-12)  # type: ignore[arg-type]
    size = layer.gram.diagonal().sqrt()
    u, s, v = torch.linalg.svd(layer.weight * size, full_matrices=False)
    for rank, found in enumerate(Olica().prune(layer, [1, 2, 3]), 1):
        torch.testing.assert_close(found.weight, u[:, :rank] * s[:rank] @ v[:rank] / size)
        best, theirs = (pruner.prune(layer, [rank])[0] for pruner in (Olica(truncate="optimal"), SVDLLM()))
        torch.testing.assert_close(best.weight, theirs.weight)
        assert layer.error(best.weight) < layer.error(found.weight)
