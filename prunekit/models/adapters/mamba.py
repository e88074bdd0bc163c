"""Mamba: selective state spaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.models.adapters.mixer import Mixer


@dataclass(frozen=True)
class Mamba(Mixer):
    """Single weights of in_proj, x_proj, dt_proj and out_proj; convolutions, A, D, norms and embeddings stay.

    The mixer of transformers calls dt_proj on no device: it multiplies its weight, and adds its bias later.
    """

    linears = ("in_proj", "x_proj", "dt_proj", "out_proj")

    @contextmanager
    def exposed(self, block: nn.Module) -> Iterator[None]:
        mixer = block.get_submodule("mixer")
        own = mixer.dt_proj
        assert isinstance(own, nn.Linear)
        with super().exposed(block):
            mixer.dt_proj = _Called(own)
            try:
                yield
            finally:
                mixer.dt_proj = own


class _Called(nn.Module):
    """Stands in for a linear map, and for its weight: to be multiplied by it is to call the map, without its bias."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> _Called:
        return self

    @property
    def bias(self) -> nn.Parameter | None:
        return self.linear.bias

    def __matmul__(self, columns: Tensor) -> Tensor:
        """W x of (windows, d_in, length); the very product of the mixer, so that no bit differs."""
        linear = self.linear
        linear.forward = lambda x: (linear.weight @ x.transpose(1, 2)).transpose(1, 2)  # type: ignore[assignment]
        try:
            return linear(columns.transpose(1, 2)).transpose(1, 2)
        finally:
            del linear.forward
