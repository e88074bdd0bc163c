"""This process: one device, or a thread for each of several that all have the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunekit import Dense, Engine, Opening, Team, Worker


@dataclass(frozen=True)
class Local(Engine):
    """This process; with `--device cuda:0,cuda:1` data-parallel, one copy of the model for each."""

    @contextmanager
    def team(self, dense: Dense, opening: Opening, devices: Sequence[torch.device]) -> Iterator[Team | None]:
        if len(devices) == 1:
            yield None
            return
        others = [replace(dense, model=copy.deepcopy(dense.model).to(device)) for device in devices[1:]]  # type: ignore[arg-type]
        with ExitStack() as stack:
            # one thread each, always the same: what torch keeps by thread stays with its worker
            threads = [stack.enter_context(ThreadPoolExecutor(1, "prunekit")) for _ in devices]
            yield Threads([Worker(each) for each in (dense, *others)], threads, devices)


class Threads(Team):
    """Workers in threads of this process."""

    def __init__(
        self, workers: Sequence[Worker], threads: Sequence[ThreadPoolExecutor], devices: Sequence[torch.device]
    ) -> None:
        self.workers, self.threads, self.size, self.devices = workers, threads, len(workers), devices

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        pairs = zip(self.workers, self.threads, each, strict=False)  # the first so many
        asked = [thread.submit(getattr(worker, method), *args) for worker, thread, args in pairs]
        return [answer.result() for answer in asked]
