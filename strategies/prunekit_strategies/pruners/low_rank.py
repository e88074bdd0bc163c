"""What pruners of low rank share: they choose a basis of the outputs, and the layer has the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

import prunekit as pk
from prunekit.layer.problem import Truncated


class LowRank(pk.LocalPruner):
    """Truncates a map to every rank along one basis."""

    structures: ClassVar[frozenset[str]] = frozenset({"low-rank"})

    @abstractmethod
    def scaled(self, layer: pk.LayerProblem) -> Float[Tensor, "d_out d_in"]:
        """W S in float64: the weight as its inputs see it, whose singular vectors are the basis."""

    def nested(self, layer: pk.LayerProblem) -> Truncated:
        basis, _, _ = torch.linalg.svd(self.scaled(layer), full_matrices=False)
        return layer.truncated(basis)

    def prune(self, layer: pk.LayerProblem, keeps: Sequence[int]) -> Sequence[pk.Candidate]:
        return self.nested(layer).candidates(keeps) if keeps else []
