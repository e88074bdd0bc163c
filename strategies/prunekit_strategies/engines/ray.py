"""A Ray cluster: every worker an actor with the model in its memory.

A worker that dies is replaced: the new one is told again what the old one had been told, and then asked
what the old one owes.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prunekit import CandidateStore, Dense, Engine, Moments, Opening, Team, Worker
from prunekit.errors import CannotGoOn, WrongInput

EVERYTHING = ("stream", "received", "carry", "advance", "open_supernet")  # what changes a worker
OVER = {
    "stream": EVERYTHING,
    "open_supernet": EVERYTHING,
    "advance": ("received",),
}  # what need not be told after it
PATIENCE = 10.0  # seconds for a cluster to answer
LIVES = 5  # of a worker's place within one question


@dataclass(frozen=True)
class Ray(Engine):
    """Workers on a Ray cluster; a worker that dies is replaced, and nothing is lost."""

    address: str | None = None  # of a cluster: auto, host:port, ray://host:port; None: one for this run on this machine
    workers: int = 0  # 0: one for every GPU, or where there is none for every node

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers is a number of them, or 0 for as many as fit, not {self.workers}")

    @contextmanager
    def team(self, dense: Dense, opening: Opening, devices: Sequence[torch.device]) -> Iterator[Team | None]:
        import ray

        own = not ray.is_initialized()
        if own:
            try:
                _reachable(self.address)  # Ray itself would try for minutes
                ray.init(self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, ValueError, RuntimeError) as error:
                why = f"no Ray cluster at {self.address!r}: {error}; leave the address away for one on this machine"
                raise WrongInput(why) from error
        try:
            free = ray.available_resources()
            gpus, cpus = int(free.get("GPU", 0)), free.get("CPU", 0.0)
            count = self.workers or gpus or sum(node["Alive"] for node in ray.nodes())
            if not gpus and cpus < count:
                raise WrongInput(f"{count} workers were asked, and the cluster has {cpus:g} CPUs and no GPU to spare")
            share: dict[str, Any] = {"num_gpus": gpus / count} if gpus else {"num_cpus": cpus // count}
            team = Actors(opening, count, share)
            yield team
            team.dismiss()
        finally:
            if own:
                ray.shutdown()


def _reachable(address: str | None) -> None:
    """Somebody listens at host:port.

    Raises:
        OSError: nobody does.
    """
    host, there, port = (address or "").removeprefix("ray://").rpartition(":")
    if there and port.isdigit():
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()


@dataclass
class Place:
    """A worker's: who is there, and what a successor must be told."""

    actor: Any
    told: list[tuple[str, Sequence[Any]]] = field(default_factory=list)


class Actors(Team):
    """Workers that are Ray actors."""

    def __init__(self, opening: Opening, count: int, share: dict[str, Any]) -> None:
        import ray

        self.size, self.opening = count, ray.put(opening)
        self.hire = ray.remote(**share)(Actor).remote
        self.places = [Place(self.hire(self.opening)) for _ in range(count)]

    def ask(self, method: str, each: Sequence[tuple[Any, ...]]) -> list[Any]:
        import ray

        if method == "open_supernet":
            far = len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}) > 1
            (space, errors, store), *_ = each
            each = [(space, errors, Shipment.of(store, far))] * len(each)
        alike = {id(arg): arg for args in each for arg in args}
        sent = {key: ray.put(arg) for key, arg in alike.items()}  # what several are told travels once
        asked = [
            (place, args, place.actor.do.remote(method, *args))
            for place, args in zip(self.places, [[sent[id(arg)] for arg in args] for args in each], strict=False)
        ]
        answers = [self._answer(place, method, args, ref) for place, args, ref in asked]
        over = OVER.get(method, ())
        for place, args, _ in asked if method != "judge" else ():
            place.told = [*(call for call in place.told if call[0] not in over), (method, args)]
        return answers

    def dismiss(self) -> None:
        """Let all go."""
        import ray

        for place in self.places:
            ray.kill(place.actor)

    def _answer(self, place: Place, method: str, args: Sequence[Any], ref: Any) -> Any:
        import ray
        from ray.exceptions import RayActorError

        for _ in range(LIVES):
            try:
                return ray.get(ref)
            except RayActorError:
                place.actor = self.hire(self.opening)
                for before, these in place.told:
                    place.actor.do.remote(before, *these)  # in order; who fails here fails below
                ref = place.actor.do.remote(method, *args)
        raise CannotGoOn(
            f"a worker died {LIVES} times over one question ({method}): look at the memory of its node; "
            "run the same command again to go on"
        )


class Actor:
    """A worker in its own process."""

    def __init__(self, opening: Opening) -> None:
        import ray

        self.worker = Worker.opened(opening, "cuda" if ray.get_gpu_ids() else "cpu")

    def do(self, method: str, *args: Any) -> Any:
        """Do as a `Worker` does; what is sent back is in the memory of the machine."""
        args = tuple(arg.unpacked() if isinstance(arg, Shipment) else arg for arg in args)
        answer = getattr(self.worker, method)(*args)
        return answer.to(torch.device("cpu")) if isinstance(answer, Moments) else answer

    def process(self) -> int:
        """Its number on its node."""
        return os.getpid()


@dataclass(frozen=True)
class Shipment:
    """A store of candidates for machines that do not see its folder."""

    store: CandidateStore
    manifest: bytes
    files: dict[str, Any]  # name -> reference to the bytes

    @classmethod
    def of(cls, store: CandidateStore, far: bool) -> Shipment:
        """The files themselves where there are machines `far` away, once for all of them."""
        import ray

        names = sorted(path.name for path in store.directory.glob("*.safetensors")) if far else []
        files = {name: ray.put((store.directory / name).read_bytes()) for name in names}
        return cls(store, (store.directory / "manifest.json").read_bytes(), files)

    def unpacked(self) -> CandidateStore:
        """The store itself where its folder is seen, or a copy."""
        import ray

        seen = self.store.directory / "manifest.json"
        if seen.exists() and seen.read_bytes() == self.manifest:
            return self.store
        folder = Path(tempfile.mkdtemp(prefix="prunekit-"))
        for name, reference in self.files.items():
            (folder / name).write_bytes(ray.get(reference))
        (folder / "manifest.json").write_bytes(self.manifest)
        copy = self.store.at(folder)
        weakref.finalize(copy, shutil.rmtree, folder, ignore_errors=True)
        return copy
