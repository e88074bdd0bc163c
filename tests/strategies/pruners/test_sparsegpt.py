import pytest
import torch
from torch import Tensor

from prunekit import LayerProblem
from prunekit.testing.layers import correlated_layer, sparse_layer
from prunekit_strategies.pruners.score import Magnitude, Wanda
from prunekit_strategies.pruners.sparsegpt import SparseGPT


def by_hand(problem: LayerProblem, shares: list[tuple[int, int]], *, rows: bool) -> Tensor:
    """The algorithm with an inverse for every column; shares: first column of a block and what it keeps per row."""
    w, n, m = problem.weight.clone(), problem.d_in, len(problem.weight)
    starts = [start for start, _ in shares] + [n]
    for (start, keep), stop in zip(shares, starts[1:], strict=True):
        corners = [torch.linalg.inv(problem.hessian[j:, j:])[0] for j in range(start, stop)]
        price = torch.stack([w[:, j] ** 2 / corners[j - start][0] for j in range(start, stop)], 1)
        kept = torch.zeros_like(price, dtype=torch.bool)
        if rows:
            kept.scatter_(1, price.topk(keep, dim=1).indices, True)
        else:
            kept.view(-1)[price.flatten().topk(keep * m).indices] = True
        for j in range(start, stop):
            lost = torch.where(kept[:, j - start], 0, w[:, j])
            w[:, j:] -= lost[:, None] * corners[j - start] / corners[j - start][0]
            w[:, j][~kept[:, j - start]] = 0
    return w


@pytest.mark.parametrize("per", ["row", "layer"])
def test_masks_and_weights_follow_the_algorithm(per: str) -> None:
    problem = sparse_layer()
    (half,) = SparseGPT(width=4, per=per).prune(problem, [6])  # type: ignore[arg-type]
    torch.testing.assert_close(half.weight, by_hand(problem, [(0, 2), (4, 2), (8, 2)], rows=per == "row"))
    (whole,) = SparseGPT(per=per).prune(problem, [5])  # type: ignore[arg-type]
    torch.testing.assert_close(whole.weight, by_hand(problem, [(0, 5)], rows=per == "row"))


def test_blocks_share_a_count_that_does_not_divide() -> None:
    problem = sparse_layer()
    (found,) = SparseGPT(width=4, per="row").prune(problem, [7])  # 7 · 4 / 12 = 2.33, 7 · 8 / 12 = 4.67
    torch.testing.assert_close(found.weight, by_hand(problem, [(0, 2), (4, 2), (8, 3)], rows=True))


def test_patterns_are_chosen_when_the_sweep_reaches_them() -> None:
    for width in (1, 6, 128):
        (found,) = SparseGPT(width=width).prune(sparse_layer(block=4), [6])
        torch.testing.assert_close(found.weight, by_hand(sparse_layer(), [(0, 2), (4, 2), (8, 2)], rows=True))


def test_its_own_mask_beats_others_and_compensation_beats_none() -> None:
    problems = [correlated_layer(seed) for seed in range(4)]
    own, wanda, magnitude, bare = (
        sum(p.error(pruner.prune(p, [48])[0].weight) for p in problems)
        for pruner in (SparseGPT(), SparseGPT(mask=Wanda()), SparseGPT(mask=Magnitude()), Wanda())
    )
    assert own < wanda < magnitude
    assert wanda < bare


def test_a_given_mask_stays() -> None:
    problem = sparse_layer()
    for keep in range(13):
        (mask,), (found,) = Wanda().prune(problem, [keep]), SparseGPT(mask=Wanda()).prune(problem, [keep])
        assert torch.equal(found.weight != 0, mask.weight != 0)
    (whole,) = SparseGPT(mask=Wanda()).prune(problem, [12])
    assert torch.equal(whole.weight, problem.weight)


def test_it_asks_for_what_its_aim_and_its_mask_read() -> None:
    assert SparseGPT().needs == {"gram"}
    assert SparseGPT(aim="stream").needs == {"gram", "cross", "drift"}
    assert SparseGPT(mask=Magnitude()).needs == {"gram", "producers"}
