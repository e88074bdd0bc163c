"""What a plug-in promises: pruner, allocator, objective, finisher.

The core judges, plug-ins propose: errors are computed by build, losses by search, prices by Space.
Plug-ins are frozen dataclasses; their fields are the hyper-parameters, a recipe sets them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.layer import Candidate, LayerProblem
from prunekit.progress import Progress
from prunekit.sites import Allocation, Site, Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.adapters import ModelAdapter
    from prunekit.calibration.tokens import TokenBatch
    from prunekit.store import Checkpoints
    from prunekit.supernet import Supernet


class LocalPruner(ABC):
    """Answers, for one layer, what to keep at every count."""

    structures: ClassVar[frozenset[str]] = frozenset({"groups"})

    @property
    def needs(self) -> frozenset[str]:
        """Fields of LayerProblem that calibration must fill: gram, cross, drift, mean, variance, coupled, gradient."""
        return frozenset({"gram"})

    @abstractmethod
    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        """One candidate for every count in `keeps`, in that order.

        `keeps` holds distinct counts of kept groups in any order, 0 and all included. The layer is not changed.
        """


@dataclass(frozen=True)
class Query:
    """A question: how good is this allocation, judged on this many tokens (None: all there are)?"""

    allocation: Allocation
    tokens: int | None = None


@dataclass(frozen=True)
class Problem:
    """All an allocator may see: numbers, no torch.

    errors[i][r] is the relative output error of site i at rung r of its ladder.
    """

    space: Space
    errors: tuple[tuple[float, ...], ...]
    start: Allocation  # feasible and tight: the uniform allocation, or the centre of the ladders
    seed: int = 0
    tokens: int = 0  # tokens there are to judge on; queries for more are answered on these

    def error(self, site: int, kept: int) -> float:
        """Relative output error of a site at a count on its ladder."""
        return self.errors[site][self.space.ladders[site].index(kept)]


Search = Generator[Sequence[Query], Sequence[float], Allocation]
"""Yields questions, is sent as many losses (lower is better, inf for what failed), returns its answer."""


class Allocator(ABC):
    """Decides how much each site keeps, as a conversation."""

    @abstractmethod
    def search(self, problem: Problem) -> Search:
        """Ask with `losses = yield queries`; every question and the answer are feasible; ask at least once."""

    def first_space(self, whole: Space) -> Space:
        """The ladders to begin with, given the space of every count: all counts on a grid of 1/16."""
        return whole.zoomed(whole.uniform(), stride=1 / 16, reach=16)

    def next_space(self, space: Space, best: Allocation) -> Space | None:
        """Finer ladders around the answer, to be pruned and searched again; None: done."""
        return None


class Objective(ABC):
    """Judges an allocation through the supernet; lower is better."""

    reads_tokens: ClassVar[bool] = True  # False: a table look-up, free in the ledger

    @abstractmethod
    def loss(self, net: Supernet, allocation: Allocation, batch: TokenBatch) -> float:
        """The loss on `batch`. Leaves the network as it was; the same question has the same answer."""


@dataclass(frozen=True, eq=False)
class Workpiece:
    """What a finisher works on: the small model, and all it may learn from."""

    model: PreTrainedModel  # the small one, in float32 or float64; its tensors are its own, to be changed in place
    dense: PreTrainedModel  # as it was before pruning, in the dtype of the computation; only to be read
    adapter: ModelAdapter  # of both
    sites: tuple[Site, ...]  # of the dense model, in order of execution
    kept: tuple[tuple[int, ...], ...]  # ids of the groups that were kept, ascending, by site; (): it was dropped
    tokens: TokenBatch  # of calibration
    seed: int
    progress: Progress
    checkpoints: Checkpoints  # what must not be made twice when a run is interrupted

    @property
    def plan(self) -> Allocation:
        """Kept groups per site."""
        return tuple(len(groups) for groups in self.kept)


class Finisher(ABC):
    """Polishes the assembled small model; every site keeps its groups.

    The core checks afterwards that every shape is as before and every weight finite, and rounds the model to
    the dtype of the checkpoint when the last finisher is done.
    """

    @property
    def adds_biases(self) -> bool:
        """Whether linear maps of sites may get a bias they did not have; then the budget makes room for all of them."""
        return False

    @abstractmethod
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        """Change the weights of `piece.model` in place; returns what it has to report, as JSON, in few words."""
