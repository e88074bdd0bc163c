"""Engines: where the work of a run is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from prunekit.plugins.dense import Dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


class Team(ABC):
    """Workers by number. Who has been asked something waits for nobody else."""

    size: int
    devices: Sequence[torch.device] = ()  # of this process, that may work on layer problems while tokens are streamed
    supernet: object = None  # the supernet that all were told to `open_supernet`

    @abstractmethod
    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What the first len(each) workers answer, each asked a `Worker` method with its own arguments."""


@dataclass(frozen=True)
class Opening:
    """How a worker elsewhere opens the model."""

    source: str | PreTrainedModel
    dtype: str = "auto"
    trust_remote_code: bool = False


def dealt(items: Sequence[Any], count: int) -> list[list[Any]]:
    """Items in order, in at most `count` pieces whose lengths differ by one at most; none is empty."""
    count = min(count, len(items))
    ends = [len(items) * i // count for i in range(count + 1)]
    return [list(items[a:b]) for a, b in pairwise(ends)]
