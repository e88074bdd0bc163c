"""What a plug-in promises: pruner, signal, allocator, objective, finisher, engine.

The core judges, plug-ins propose: errors are computed by build, losses by search, prices by Space.
Plug-ins are frozen dataclasses; their fields are the hyper-parameters, a recipe sets them by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.errors import WrongInput
from prunekit.layer import Candidate, LayerProblem
from prunekit.memory import Room
from prunekit.progress import Progress
from prunekit.sites import Allocation, Site, Space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.adapters import ModelAdapter
    from prunekit.calibration.tokens import TokenBatch
    from prunekit.checkpoint import Dense
    from prunekit.store import Checkpoints
    from prunekit.supernet import Supernet
    from prunekit.team import Opening, Team


class LocalPruner(ABC):
    """Answers, for one layer, what to keep at every count."""

    structures: ClassVar[frozenset[str]] = frozenset({"groups"})  # and/or weights, n:m

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must fill of a `LayerProblem`; the names are in `prunekit.layer.STATISTICS`.

        gram, cross, drift, mean, variance, absolute, relative, feeders: the fields of these names. power: of every
        feeder. contrast: a second data set is read. gradient: gradients and fishers of the layer, and of feeders if
        asked.
        """
        return frozenset({"gram"})

    @abstractmethod
    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        """One candidate for every count in `keeps`, in that order.

        `keeps` holds distinct counts of kept groups in any order, 0 and all included. The layer is not changed.

        Where `layer.structure` is weights, a count k allows k non-zeros in every row, or k · d_out anywhere; where it
        is n:m, k · block / d_in in every `block` of a row. Such candidates have no `kept`.
        """

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"] | None:
        """What each group is worth, larger is better, for allocators that rank the groups of all sites together.

        None, as here: this pruner weighs no group by itself.
        """
        return None


class Signal(ABC):
    """Measures one number per site, for allocators that decide from numbers like it."""

    unitless: ClassVar[bool] = False  # True: the same number when all weights of the site are in other units

    @property
    def needs(self) -> frozenset[str]:
        """What calibration must fill of a `LayerProblem`, as for a pruner."""
        return frozenset({"gram"})

    @abstractmethod
    def measure(self, layer: LayerProblem) -> float:
        """A finite number that does not depend on the order of the groups. The layer is not changed."""


Measurable = Signal | str | Mapping[str, Any]
"""A signal, its name, or {name: ..., option: value} as in a recipe."""


@dataclass(frozen=True)
class Query:
    """A question: how good is this allocation, judged on this many tokens (None: all there are)?

    A probe may cost more than the budget: it teaches, but what is not feasible cannot win. Each of its
    counts is a rung, or all groups of the site: the dense sub-layer where the ladder lacks that count.
    """

    allocation: Allocation
    tokens: int | None = None
    probe: bool = False


class Journal:
    """What a search learns from elsewhere than its losses. This one forgets at once; that of a run is its ledger."""

    def once(self, question: Mapping[str, Any], answer: Callable[[], Any]) -> Any:
        """The answer to a question, both JSON values: the one on record, or that of `answer()`, put on record.

        Whatever is not a function of the problem (another program's reply, a clock) comes through here, so that a
        resumed run holds the same conversation without asking again. What `answer` raises is not recorded.
        """
        return answer()

    def note(self, line: str) -> None:
        """A line for the record and for the user."""


@dataclass(frozen=True)
class Problem:
    """All an allocator may see: numbers, no torch.

    errors[i][r] is the relative output error of site i at rung r of its ladder. Signals and scores are there when
    the allocator asks for them; in every walk they are measured on what reaches the site in that walk.
    """

    space: Space
    errors: tuple[tuple[float, ...], ...]
    start: Allocation  # feasible and tight: the uniform allocation, or the centre of the ladders
    seed: int = 0
    tokens: int = 0  # tokens there are to judge on; queries for more are answered on these
    signals: tuple[tuple[float, ...], ...] = ()  # signals[s][i]: the allocator's signal s at site i
    scores: tuple[tuple[float, ...], ...] | None = None  # scores[i][g]: what the pruner says group g of site i is worth
    journal: Journal = field(default_factory=Journal, compare=False, repr=False)

    def error(self, site: int, kept: int) -> float:
        """Relative output error of a site at a count on its ladder."""
        return self.errors[site][self.space.ladders[site].index(kept)]


Search = Generator[Sequence[Query], Sequence[float], Allocation]
"""Yields questions, is sent as many losses (lower is better, inf for what failed), returns its answer."""


class Allocator(ABC):
    """Decides how much each site keeps, as a conversation. What wraps another asks for what that one asks for."""

    @property
    def signals(self) -> tuple[Measurable, ...]:
        """What to measure at every site, in every walk; `Problem.signals` has one row for each."""
        return ()

    @property
    def needs(self) -> frozenset[str]:
        """What else of a `Problem` must be filled: scores, from a pruner that has them."""
        return frozenset()

    @abstractmethod
    def search(self, problem: Problem) -> Search:
        """Ask with `losses = yield queries`; questions are feasible or probes, the answer is feasible; ask once."""

    def ready(self) -> None:
        """Raise WrongInput for what the search needs and this machine lacks; called before any long work."""
        return  # most need nothing

    def first_space(self, whole: Space) -> Space:
        """The ladders to begin with, given the space of every count: all counts on a grid of 1/16."""
        return whole.zoomed(whole.uniform(), stride=1 / 16, reach=16)

    def next_space(self, space: Space, best: Allocation) -> Space | None:
        """Finer ladders around the answer, to be pruned and searched again; None: done."""
        return None

    def last_space(self, whole: Space, best: Allocation) -> Space:
        """What is built, one rung per site: the answer, and what coarse rungs left of the budget spent."""
        return whole.zoomed(whole.nearest(best), reach=0)


class Objective(ABC):
    """Judges an allocation through the supernet; lower is better."""

    reads_tokens: ClassVar[bool] = True  # False: a table look-up, free in the ledger

    @abstractmethod
    def loss(self, net: Supernet, allocation: Allocation, batch: TokenBatch) -> float:
        """The loss on `batch`. Leaves the network as it was; the same question has the same answer."""

    def check(self, batch: TokenBatch) -> None:
        """Refuse, before any long work, tokens that `loss` cannot judge on; here questions, whose windows are padded.

        Raises:
            WrongInput: says what the objective needs.
        """
        if batch.answers is not None:
            raise WrongInput(
                f"{type(self).__name__} judges on running text, and {batch.source} holds questions; "
                "take the objective task, or another data.search_dataset"
            )

    def parts(self, batch: TokenBatch) -> Sequence[TokenBatch]:
        """The batches that `loss` will ask the supernet about; allocations are run on these together."""
        return (batch,)

    def depths(self, blocks: int) -> Sequence[int]:
        """Behind how many of so many blocks `loss` reads hidden states; the last, for logits, is always kept."""
        return ()

    def top(self) -> int:
        """How many of the dense model's most probable tokens `loss` reads at every position: what a plan counts."""
        return 0


@dataclass(frozen=True, eq=False)
class Workpiece:
    """What a finisher works on: the small model, and all it may learn from."""

    model: PreTrainedModel  # the small one, in float32 or float64; its tensors are its own, to be changed in place
    dense: PreTrainedModel  # as it was before pruning, in the dtype of the computation; only to be read
    adapter: ModelAdapter  # of both
    sites: tuple[Site, ...]  # of the dense model, in order of execution
    plan: Allocation  # kept groups, or weights per row, by site
    kept: tuple[tuple[int, ...], ...]  # ids of the groups that were kept, ascending, by site; (): dropped, or no groups
    tokens: TokenBatch  # of calibration
    seed: int
    progress: Progress
    checkpoints: Checkpoints  # what must not be made twice when a run is interrupted
    room: Room = field(default_factory=Room)  # for activations that memory may not hold


class Finisher(ABC):
    """Polishes the assembled small model; every site keeps its groups, or its count of weights.

    The core checks afterwards that every shape is as before, every weight finite and no count exceeded, and rounds
    the model to the dtype of the checkpoint when the last finisher is done.
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups"})  # or weights, n:m: zeros stay where there are as many

    @property
    def adds_biases(self) -> bool:
        """Whether linear maps of sites may get a bias they did not have; then the budget makes room for all of them."""
        return False

    def check(self, adapter: ModelAdapter) -> None:
        """Refuse, before any long work, a family of models it cannot work on.

        Raises:
            WrongInput: says what the finisher needs.
        """
        return  # most work on all

    @abstractmethod
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        """Change the weights of `piece.model` in place; returns what it has to report, as JSON, in few words."""


class Engine(ABC):
    """Where the work of a run is done."""

    @abstractmethod
    def team(
        self, dense: Dense, opening: Opening, devices: Sequence[torch.device]
    ) -> AbstractContextManager[Team | None]:
        """Workers until the run is over; None: the run needs nobody else.

        `dense` is on the first of the devices the run may use; `opening` says how others open it.

        Raises:
            WrongInput: there are no such workers; says what to do.
        """
