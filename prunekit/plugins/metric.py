"""Metrics whose prices are measured on the dense model; of the others, see `prunekit.space.metrics`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from prunekit.space.metrics import Metric
from prunekit.space.sites import Site
from prunekit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.plugins.dense import Dense


@dataclass(frozen=True)
class Runs:
    """Runs of whole models that a metric asks for, for plans."""

    count: int  # at least
    tokens: int  # of each
    seqlen: int  # that a token attends to
    copied: int = 0  # parameters of the largest model beside the dense one
    unknown: str = ""  # what else takes time


class MeasuredMetric(Metric):
    """A metric whose prices are measured on the dense model, before the search.

    What was measured is an option of the plug-in, `prices`: plain JSON values; None as long as nothing was. A run keeps
    them in a file beside its result, prices.json, and a recipe may give them, or that file, or the folder it is in.
    """

    counts_width = False  # it measures the dense model

    prices: Any

    @abstractmethod
    def measured(self, dense: Dense, sites: Sequence[Site], past: Path | None, progress: Progress) -> Self:
        """This metric with its prices filled in.

        Args:
            dense: the model, to be left as it was.
            sites: all of the model.
            past: where an earlier process of the same run may have left prices; None: there was none.
            progress: told what is done, and what the user should know of prices that were given.

        Raises:
            WrongInput: what is asked cannot be measured on this model.
            CannotGoOn: what was measured cannot be.
        """

    @abstractmethod
    def stand_in(self) -> Metric:
        """The registered metric that plans count as long as nothing was measured."""

    @abstractmethod
    def runs_before(self, model: PreTrainedModel, sites: Sequence[Site]) -> Runs:
        """What `measured` takes, from the model's shapes alone.

        Raises:
            WrongInput: what is asked cannot be measured on this model.
        """

    @abstractmethod
    def runs_after(self, model: PreTrainedModel) -> Runs:
        """What `realised` takes, as of `runs_before`."""

    @abstractmethod
    def realised(
        self, dense: PreTrainedModel, small: PreTrainedModel, target: float, promised: float, progress: Progress
    ) -> Mapping[str, Any]:
        """What the pruned model takes indeed.

        Args:
            dense: the model as it was.
            small: the pruned model, as it will be exported.
            target: the share of the dense model's that was asked for.
            promised: the share that the prices promise.
            progress: told what is done.

        Returns:
            JSON values for the report: target; promised; realised, the share that was measured; miss, realised over
            promised less 1; kept, whether that is near enough; noise, {"result": how far measurements of one model
            vary, as a share}; and what else there is to say.
        """
