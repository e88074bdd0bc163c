"""Products of values that were bfloat16, in float32, by the matrix units of a CPU.

torch multiplies bfloat16 matrices on a CPU into bfloat16 alone. What it has in the place of a result in float32 is a
switch of the process that lets float32 matrices be rounded to bfloat16 on their way into the units, which add up in
float32. Values that were bfloat16 are not changed by that, and a product of two of them is exact in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

UNITS = "amx_bf16"  # as torch names them; instructions without units (AVX512-BF16) are slower than float32
_others = 0  # pools of threads that multiply beside the one that asks


@contextmanager
def threads_at_work() -> Iterator[None]:
    """Within: other threads of this process multiply, so the switch stays as it is."""
    global _others  # noqa: PLW0603
    _others += 1
    try:
        yield
    finally:
        _others -= 1


@contextmanager
def of_halves(*operands: torch.Tensor) -> Iterator[None]:
    """Within: float32 products of these, widened, are made by units for bfloat16.

    Nothing is switched unless all of them are bfloat16 on a CPU that has such units and nobody else multiplies.
    """
    halves = all(each.dtype == torch.bfloat16 and each.device.type == "cpu" for each in operands)
    if not halves or _others or not has_units():
        yield
        return
    switch = _switch()
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


@cache
def has_units() -> bool:
    """Whether this CPU has such units, and torch the switch; nothing is timed, since bits depend on it."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return hasattr(_switch(), "fp32_precision") and bool(known.get(UNITS))


def _switch() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)
