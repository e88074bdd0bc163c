"""Recovery steps: what improves the assembled small model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from prunekit.space.sites import Allocation, Site
from prunekit.system.memory import Room
from prunekit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.data.tokens import TokenBatch
    from prunekit.plugins.adapter import ModelAdapter
    from prunekit.system.checkpoints import Checkpoints


@dataclass(frozen=True, eq=False)
class Workpiece:
    """What a finisher works on: the small model, and all it may learn from."""

    model: PreTrainedModel  # the small one, in float32 or float64; its tensors are its own, to be changed in place
    dense: PreTrainedModel  # as it was before pruning, in the dtype of the computation; only to be read
    adapter: ModelAdapter  # of both
    sites: tuple[Site, ...]  # of the dense model, in order of execution
    plan: Allocation  # kept groups, or weights per row, by site
    kept: tuple[tuple[int, ...], ...]  # ids of the groups that were kept, ascending, by site; (): dropped, or no groups
    tokens: TokenBatch  # of calibration; of recovery for those that train
    seed: int
    progress: Progress
    checkpoints: Checkpoints  # what must not be made twice when a run is interrupted
    room: Room = field(default_factory=Room)  # for activations that memory may not hold
    seconds: float | None = None  # it may take; None: as long as its options say
    domains: Mapping[str, float] = field(default_factory=dict)
    """Share of the text that a learner gave every data set in the end, by the label of its windows; empty: none did."""


class Finisher(ABC):
    """Polishes the assembled small model; every site keeps its groups, or its count of weights.

    The core checks afterwards that every shape is as before, every weight finite and no count exceeded, and rounds
    the model to the dtype of the checkpoint when the last finisher is done.
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups"})  # or weights, n:m: zeros stay where there are as many
    knows_width: ClassVar[bool] = False  # the dense model may have a wider residual stream than the small one
    trains: ClassVar[bool] = False  # then it has text of its own: what the pruner has fitted has little left to teach

    @property
    def adds_biases(self) -> bool:
        """Whether linear maps of sites may get a bias they did not have; then the budget makes room for all of them."""
        return False

    def reserved(self, sites: Sequence[Site]) -> int:
        """How many parameters it may add beside MLPs (`ModelAdapter.add_patch`); the budget sets them aside.

        One that adds any is the last finisher of a recipe: those that fit sub-layers look at their linear maps alone.

        Args:
            sites: all of the dense model.
        """
        return 0

    def check(self, adapter: ModelAdapter) -> None:
        """Refuse, before any long work, a family of models it cannot work on.

        Raises:
            WrongInput: says what the finisher needs.
        """
        return  # most work on all

    @abstractmethod
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        """Change the weights of `piece.model` in place.

        Args:
            piece: the small model, and all there is to learn from.

        Returns:
            What it has to report, as JSON, in few words. Who has heeded `piece.seconds` reports the options that do the
            same without a clock, under the key options; the recipe beside the result gets them.
        """
