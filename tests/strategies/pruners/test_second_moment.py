from dataclasses import replace

import pytest
import torch

from prunekit import LayerProblem
from prunekit.testing import toy_layer
from prunekit_strategies.pruners.second_moment import SecondMoment, least_alike

WEIGHT = torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 2.0, 1.0, -2.0]])  # ΣW²: 9, 5, 1, 8
GRAM = torch.diag(torch.tensor([4.0, 1.0, 49.0, 0.25]))


def test_scores_by_hand() -> None:
    assert SecondMoment().scores(LayerProblem(WEIGHT, GRAM)).tolist() == [36, 5, 49, 2]
    assert SecondMoment().scores(LayerProblem(WEIGHT, GRAM, group_size=2)).tolist() == [41, 51]


@pytest.mark.parametrize("size", [1, 3])
def test_the_score_is_the_exact_error_of_removing_a_group_alone(size: int) -> None:
    layer = toy_layer(5, size, dtype=torch.float64, moments=torch.float64)
    power = float(((layer.weight @ layer.gram) * layer.weight).sum())
    for g, score in enumerate(SecondMoment().scores(layer).tolist()):
        rest = [other for other in range(5) if other != g]
        assert layer.error(layer.masked(rest).weight) * power == pytest.approx(score, rel=1e-9)


def test_of_the_two_most_alike_the_quieter_goes_first() -> None:
    # outputs a, a/2 and something of its own that is quieter than both
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).double()
    x[:, 2:4] = x[:, 0:2]
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()
    weight[:, 2:4] = 0.5 * weight[:, 0:2]
    weight[:, 4:] *= 0.1
    layer = LayerProblem(weight, x.T @ x / 200, group_size=2)
    one, two = SecondMoment(heads="likeness").prune(layer, [1, 2])
    assert two.kept == (0, 2)
    assert one.kept == (0,)
    assert layer.error(two.weight) < 1e-3  # least squares gives the survivor what its twin did
    assert SecondMoment().prune(layer, [2])[0].kept == (0, 1)


def test_likeness_is_that_of_the_outputs_taken_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    weight = torch.randn(5, 12, generator=generator).double()
    layer = LayerProblem(weight, x.T @ x / 60, group_size=3)
    outputs = torch.stack([(x[:, 3 * g : 3 * g + 3] @ weight[:, 3 * g : 3 * g + 3].T).flatten() for g in range(4)])
    alive, gone = {0, 1, 2, 3}, []
    while len(alive) > 1:
        pairs = [(a, b) for a in alive for b in alive if a < b]
        alike = torch.nn.functional.cosine_similarity
        pair = max(pairs, key=lambda ab: float(alike(outputs[ab[0]], outputs[ab[1]], 0)))
        gone.append(min(pair, key=lambda g: float(outputs[g].norm())))
        alive.remove(gone[-1])
    for keep, candidate in enumerate(SecondMoment(heads="likeness").prune(layer, range(5))):
        assert set(range(4)) - set(candidate.kept or ()) == set(gone[: 4 - keep]) | (alive if keep == 0 else set())


def test_neurons_go_by_energy_and_groups_without_output_go_first() -> None:
    layer = toy_layer(6)
    energy, likeness = SecondMoment(), SecondMoment(heads="likeness")
    assert [c.kept for c in energy.prune(layer, range(7))] == [c.kept for c in likeness.prune(layer, range(7))]
    products = torch.diag(torch.tensor([0.0, 2.0, 0.0, 3.0]))
    products[1, 3] = products[3, 1] = 1.0
    assert least_alike(products) == [3, 1, 0, 2]
    assert least_alike(torch.zeros(3, 3)) == [0, 1, 2]


def test_the_refit_is_least_squares_and_can_be_left_out() -> None:
    layer = toy_layer(6, 2)
    for fitted, plain in zip(
        SecondMoment().prune(layer, [2, 4]), replace(SecondMoment(), refit=False).prune(layer, [2, 4]), strict=True
    ):
        assert fitted.kept == plain.kept
        torch.testing.assert_close(fitted.weight, layer.refitted(fitted.kept or ()).weight)
        assert torch.equal(plain.weight, layer.masked(plain.kept or ()).weight)
