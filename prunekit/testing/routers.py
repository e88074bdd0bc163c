"""Routers of experts whose scores are known exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def mask_experts(router: nn.Module, kept: Sequence[int]) -> None:
    """Let a router give every expert that is not kept a score of -∞; no parameter changes."""
    plain = torch.nn.functional.linear

    def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = plain(x, weight, bias)
        gone = torch.ones(scores.shape[-1], dtype=torch.bool)
        gone[list(kept)] = False
        return scores.masked_fill(gone, -torch.inf)

    def forward(hidden: Tensor) -> Any:
        torch.nn.functional.linear = masked  # type: ignore[assignment]  it is the only linear map of a router
        try:
            return type(router).forward(router, hidden)
        finally:
            torch.nn.functional.linear = plain

    router.forward = forward


@contextmanager
def exact_softmax() -> Iterator[None]:
    """Within: every softmax is computed and answered in float64; routers ask for float32, whatever the model is in."""
    plain = torch.nn.functional.softmax

    def exact(x: Tensor, dim: int = -1, dtype: Any = None, **_: Any) -> Tensor:
        return plain(x.double(), dim=dim)

    torch.nn.functional.softmax = exact  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.softmax = plain
