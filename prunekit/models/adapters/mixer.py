"""Blocks that are a norm and one mixer, as in state space models: single weights of its linear maps can be removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from prunekit.plugins.adapter import ModelAdapter
from prunekit.space.sites import Site


@dataclass(frozen=True)
class Mixer(ModelAdapter):
    """A family sets the class variables. Each linear map has an input of its own."""

    linears: ClassVar[tuple[str, ...]]  # of a mixer, in order of execution; the last one makes its output
    layers = "backbone.layers"

    def stages(self, block: nn.Module) -> list[tuple[str, ...]]:
        return [(f"mixer.{name}",) for name in self.linears]

    def part(self, site: Site) -> str | None:
        return "mixer" if self.path(site) == f"mixer.{self.linears[-1]}" else None

    def holder(self, site: Site) -> str | None:
        return self.part(site)

    def adds_up(self, block: nn.Module) -> bool:
        return True

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        hidden = model.get_submodule("backbone.norm_f")(hidden)  # may be wider than the weights
        head = model.get_submodule("lm_head")
        return head(hidden.to(head.weight.dtype)).float()  # type: ignore[arg-type]

    @contextmanager
    def exposed(self, block: nn.Module) -> Iterator[None]:
        """As promised: a mixer that trains may hand the weights of its linear maps to one fused kernel."""
        mixer = block.get_submodule("mixer")
        was, mixer.training = mixer.training, False  # of the mixer alone: what is in it stays as it is
        try:
            yield
        finally:
            mixer.training = was
