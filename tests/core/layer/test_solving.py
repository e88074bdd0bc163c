"""Factors of moments: the bits of LAPACK where it finds one, and the least that helps where it does not."""

import logging

import pytest
import torch
from torch import Tensor

from prunekit import factored, inverted, solved
from prunekit.layer.solving import margin

EPS = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(*batch: int, n: int = 6) -> Tensor:
    x = normal(*batch, 4 * n, n)
    return x.mT @ x


def test_what_has_a_factor_keeps_its_bits() -> None:
    for matrix in (moments(), moments(3), moments(2, 3), moments(n=1), torch.zeros(0, 0), torch.zeros(3, 0, 0)):
        assert torch.equal(factored(matrix), torch.linalg.cholesky(matrix))
    right = normal(6, 2)
    assert torch.equal(solved(moments(), right), torch.cholesky_solve(right, torch.linalg.cholesky(moments())))
    assert torch.equal(inverted(moments()), torch.cholesky_inverse(torch.linalg.cholesky(moments())))


def test_of_a_batch_only_those_without_a_factor_rise() -> None:
    batch = moments(5).clone()
    batch[1], batch[3] = torch.ones(6, 6), torch.ones(6, 6) - 1e-9 * torch.eye(6).double()
    found = factored(batch)
    for i in (0, 2, 4):
        assert torch.equal(found[i], torch.linalg.cholesky(batch[i]))
    added = [float((found[i] @ found[i].T - batch[i]).diagonal().max()) for i in (1, 3)]
    assert added[0] == pytest.approx(margin(6), rel=1e-2)
    assert 1e-9 < added[1] < 2e-8  # no more than ten times what it takes
    nested = torch.stack([batch, batch])
    assert torch.equal(factored(nested), torch.stack([found, found]))


def test_where_columns_are_one_the_answer_is_least_squares() -> None:
    x = normal(40, 4)[:, [0, 1, 1, 2, 3, 3]]
    y = x @ normal(6, 3)
    w = solved(x.T @ x, x.T @ y)
    torch.testing.assert_close(x @ w, y, rtol=1e-6, atol=1e-6)


def test_columns_of_any_size_and_none_are_solved_for() -> None:
    scale = torch.tensor([1e8, 1.0, 1e-8, 0.0], dtype=torch.float64)
    x = normal(20, 4)
    x[:, 2] = x[:, 1]
    matrix = (x.T @ x) * scale * scale[:, None]
    w = solved(matrix, (matrix @ torch.ones(4).double())[:, None])[:, 0]
    assert w[0] == pytest.approx(1, abs=1e-6)
    assert float(w[1] + w[2] * scale[2]) == pytest.approx(1, abs=1e-6)  # the small twin is not drowned by the first
    assert w[3] == 0
    assert not solved(torch.zeros(2, 2), torch.zeros(2, 1)).any()


def test_a_rise_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "prunekit"):
        factored(moments())
        assert not caplog.messages
        factored(torch.zeros(2, 3, 3))
    (line,) = caplog.messages
    assert line.startswith("2 of 2 (3, 3) matrices solved with ")


@pytest.mark.parametrize(
    "matrix",
    [-torch.eye(3), torch.full((3, 3), torch.nan), torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])],
    ids=["negative", "nan", "indefinite"],
)
def test_what_is_no_second_moment_is_refused_with_its_size(matrix: Tensor) -> None:
    for some in (matrix, matrix.double(), torch.stack([torch.eye(3), matrix])):
        with pytest.raises(ValueError, match=r"1 of \d \(3, 3\) matrices have no Cholesky factor.*raise `damping`"):
            factored(some)


@pytest.mark.parametrize("n", [1, 2, 7, 40, 150])
def test_with_the_margin_every_part_in_every_order_has_a_factor_whatever_the_rounding(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    for x in (torch.ones(1, n).double(), normal(1, n).abs(), normal(2, n), normal(n + 1, n)[:, torch.arange(n) // 2]):
        scale = 10 ** (8 * torch.rand(n, generator=generator, dtype=torch.float64) - 4)
        matrix = (x.T @ x) * scale * scale[:, None]
        matrix.diagonal().mul_(1 + margin(n))
        for _ in range(20):
            part = torch.randperm(n, generator=generator)[: int(torch.randint(1, n + 1, (), generator=generator))]
            noise = EPS * torch.randint(-1, 2, matrix.shape, generator=generator)
            assert not bool(torch.linalg.cholesky_ex((matrix * (1 + noise))[part][:, part]).info)
