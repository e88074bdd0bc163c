"""An adapter for prunekit: where the models of one family can be cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.ModelAdapter):
    """Models of `model_type` template, laid out as Llama: single weights and patterns N:M can be removed.

    Say here what is special in the family. Heads and neurons can be removed once prunekit has classes with layers of
    unequal size for the family.
    """

    layers: ClassVar[str] = "model.layers"  # path of the list of blocks

    def stages(self, block: nn.Module) -> list[tuple[str, ...]]:
        """Linear layers in order of execution, those with one input together: the names of your family go here."""
        return [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ]

    def part(self, site: pk.Site) -> str | None:
        """The sub-layer whose output the layer of a site makes."""
        return {"self_attn.o_proj": "attention", "mlp.down_proj": "mlp"}.get(self.path(site))

    def holder(self, site: pk.Site) -> str | None:
        """The module of that sub-layer."""
        return {"attention": "self_attn", "mlp": "mlp", None: None}[self.part(site)]

    def adds_up(self, block: nn.Module) -> bool:
        """Whether a block is its input plus what its sub-layers make, with no norm behind them."""
        return True

    def logits(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """What the model makes of the output of the last block."""
        return model.get_submodule("lm_head")(model.get_submodule("model.norm")(hidden))
