"""An engine for prunekit: where the work of a run is done."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Engine):
    """Several workers on every device, each a thread of this process with a copy of the model.

    Calibration tokens and the questions of a search are dealt out among them. Workers on other machines are opened
    there by `pk.Worker.opened(opening, device)`, and `Workers.ask` sends them what it is asked.
    """

    each: int = 2  # workers on every device

    @contextmanager
    def team(self, dense: pk.Dense, opening: pk.Opening, devices: Sequence[torch.device]) -> Iterator[pk.Team | None]:
        """Workers until the run is over: your machines go here."""
        places = [device for device in devices for _ in range(self.each)]
        copies = [replace(dense, model=copy.deepcopy(dense.model).to(place)) for place in places[1:]]  # type: ignore[arg-type]
        with ExitStack() as stack:  # one thread for each, always the same
            threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in places]
            yield Workers([pk.Worker(own) for own in (dense, *copies)], threads)


class Workers(pk.Team):
    """Workers by number, and the thread of each."""

    def __init__(self, workers: Sequence[pk.Worker], threads: Sequence[ThreadPoolExecutor]) -> None:
        self.workers, self.threads, self.size = workers, threads, len(workers)

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method on the first workers, each with its own arguments, and return the answers in order."""
        asked = [
            thread.submit(getattr(worker, method), *arguments)
            for worker, thread, arguments in zip(self.workers, self.threads, each, strict=False)
        ]
        return [answer.result() for answer in asked]
