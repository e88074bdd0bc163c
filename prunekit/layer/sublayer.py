"""The contract of sub-layers: attention or an MLP, cut to a candidate, run on calibration tokens with weights to train.

Who trains sees windows, losses and weights; what runs them has the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from prunekit.layer.candidates import Candidate


class CutSubLayer(ABC):
    """A sub-layer of which some groups stay."""

    weights: list[Tensor]
    """Of every producer layer the rows that stay, last the columns of the layer itself: leaves in float32 or better,
    to be changed in place. Biases stay as they are."""

    @abstractmethod
    def losses(self, chunk: int) -> Float[Tensor, " windows"]:
        """Of every window of a chunk, Σ ‖f(x) - y‖² over its tokens, y what the dense sub-layer makes of the same x.

        Relative to the mean over all windows of Σ ‖W x̂‖²: the mean over all windows is the relative output error. Where
        gradients are enabled the loss has one for `weights`, and the tokens count as sent there and back.
        """

    @abstractmethod
    def candidate(self) -> Candidate:
        """The candidate with the weights of now."""


class SubLayer(ABC):
    """The sub-layer whose last linear map is a layer, on the tokens that calibration sends through it."""

    @property
    @abstractmethod
    def chunks(self) -> Sequence[int]:
        """Windows of every chunk of tokens: what goes through at once."""

    @abstractmethod
    def shapes(self, kept: int) -> list[tuple[int, int]]:
        """Of the weights of producer layers where so many groups stay: (rows, columns)."""

    @abstractmethod
    def cut(self, candidate: Candidate) -> CutSubLayer:
        """The sub-layer with the weights of a candidate, which is not changed."""
