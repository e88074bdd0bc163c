import pytest
import torch

from prunekit import LayerProblem
from prunekit_strategies.pruners.magnitude import Magnitude

WEIGHT = torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 2.0, 1.0, -2.0]])  # squared norms of columns: 9, 5, 1, 8


def test_keeps_the_largest_columns_by_hand() -> None:
    one, two = Magnitude().prune(LayerProblem(WEIGHT, torch.eye(4)), [1, 3])
    assert (one.kept, two.kept) == ((0,), (0, 1, 3))
    assert two.weight.tolist() == [[3, -1, 0, 2], [0, 2, 0, -2]]


def test_keeps_the_largest_block_by_hand() -> None:
    (one,) = Magnitude().prune(LayerProblem(WEIGHT, torch.eye(4), group_size=2), [1])
    assert one.kept == (0,)  # 9 + 5 against 1 + 8


def test_counts_the_weights_that_feed_a_group() -> None:
    layer = LayerProblem(WEIGHT, torch.eye(4), coupled=torch.tensor([0.0, 0.0, 9.0, 0.0]))
    (one,) = Magnitude().prune(layer, [1])
    assert one.kept == (2,)  # 1 + 9 against 9


def test_counts_are_exact_on_ties_and_the_lower_id_stays() -> None:
    candidates = Magnitude().prune(LayerProblem(torch.ones(2, 5), torch.eye(5)), range(6))
    assert [c.kept for c in candidates] == [tuple(range(k)) for k in range(6)]


def test_does_not_look_at_the_inputs() -> None:
    loud = torch.diag(torch.tensor([1e-6, 1.0, 1e6, 1.0]))
    (one,) = Magnitude().prune(LayerProblem(WEIGHT, loud), [1])
    assert one.kept == (0,)


def test_refit_changes_the_weights_not_the_groups() -> None:
    gram = torch.eye(4) + 0.5
    layer = LayerProblem(WEIGHT, gram)
    for plain, fitted in zip(Magnitude().prune(layer, [1, 2]), Magnitude(refit=True).prune(layer, [1, 2]), strict=True):
        assert plain.kept == fitted.kept
        torch.testing.assert_close(fitted.weight, layer.refitted(plain.kept or ()).weight)
        assert layer.error(fitted.weight) < layer.error(plain.weight)


@pytest.mark.parametrize(("refit", "needs"), [(False, {"coupled"}), (True, {"coupled", "gram"})])
def test_asks_for_what_it_uses(refit: bool, needs: set[str]) -> None:
    assert Magnitude(refit).needs == needs
