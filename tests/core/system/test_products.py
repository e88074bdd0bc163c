"""Products of what was bfloat16 lose nothing by the units that make them, and no other product is touched."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from prunekit.calibration.moments import GRAM, Moments, multiplied
from prunekit.calibration.pool import Pool
from prunekit.layer.statistics import MapShape, Received
from prunekit.system import products
from prunekit.system.products import of_halves, threads_at_work

CPU = torch.device("cpu")
SWITCH: Any = getattr(torch.backends.mkldnn, "matmul", None)
reads_switch = pytest.mark.skipif(not hasattr(SWITCH, "fp32_precision"), reason="torch has no such switch")


def switched() -> str:
    return SWITCH.fp32_precision


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_units", lambda: True)


def drawn(tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, width, generator=generator) * torch.logspace(-3, 3, width)).to(dtype)


@pytest.mark.parametrize("shape", [(300, 96, 64), (2048, 576, 576), (33, 7, 5)])
def test_products_of_bfloat16_are_as_exact_as_in_float32(shape: tuple[int, int, int]) -> None:
    tokens, m, n = shape
    left, right = drawn(tokens, m, torch.bfloat16), drawn(tokens, n, torch.bfloat16, 1)
    exact, found = left.double().T @ right.double(), multiplied(left, right)
    scale = left.double().abs().T @ right.double().abs()
    assert found.dtype == torch.float32
    assert ((found - exact).abs() <= 1e-6 * scale).all()  # bfloat16 would be off by 4e-3


def test_moments_of_bfloat16_are_as_exact_as_in_float32() -> None:
    x = drawn(512, 192, torch.bfloat16)
    moments = Moments.empty((GRAM,), MapShape(192, 8), CPU)
    moments.add(Received(lambda: x))
    exact, scale = x.double().T @ x.double() / 512, x.double().abs().T @ x.double().abs() / 512
    assert ((moments.gram - exact).abs() <= 1e-6 * scale).all()


def test_float32_stays_float32() -> None:
    left, right = drawn(512, 96, torch.float32), drawn(512, 64, torch.float32, 1)
    exact = left.double().T @ right.double()
    scale = left.double().abs().T @ right.double().abs()
    assert ((multiplied(left, right) - exact).abs() <= 1e-6 * scale).all()


@reads_switch
@pytest.mark.usefixtures("units")
def test_the_switch_is_put_back_whatever_happens() -> None:
    before, x = switched(), drawn(8, 8, torch.bfloat16)
    with of_halves(x, x):
        assert switched() == "bf16"
    assert switched() == before
    with pytest.raises(KeyError), of_halves(x):
        raise KeyError
    assert switched() == before


@reads_switch
@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_values_do_not_switch(dtype: torch.dtype) -> None:
    before, half = switched(), drawn(8, 8, torch.bfloat16)
    with of_halves(half, drawn(8, 8, dtype)):
        assert switched() == before


@reads_switch
@pytest.mark.usefixtures("units")
def test_nothing_is_switched_while_other_threads_multiply() -> None:
    before, x = switched(), drawn(8, 8, torch.bfloat16)

    def seen() -> str:
        with of_halves(x):
            return switched()

    with ExitStack() as stack:
        stack.enter_context(threads_at_work())
        with threads_at_work():
            assert seen() == before
        assert seen() == before
    assert seen() == "bf16"
    with Pool([CPU]):
        assert seen() == before
    with pytest.raises(KeyError), Pool([CPU]):
        raise KeyError
    with Pool():  # the caller does everything
        assert seen() == "bf16"


@reads_switch
def test_a_cpu_without_units_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = switched()
    monkeypatch.setattr(products, "has_units", lambda: False)
    with of_halves(drawn(8, 8, torch.bfloat16)):
        assert switched() == before
