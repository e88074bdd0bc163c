"""Candidates on disk: kept columns, or a bit mask and values, in safetensors; a manifest with checksums.

A store belongs to one calibration pass. A site is in it whole or not at all, so an interrupted pass goes on
where it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prunekit.errors import PluginError
from prunekit.layer.candidates import Candidate
from prunekit.layer.layouts import layout_of
from prunekit.models.shards import file_bytes
from prunekit.space.sites import Site
from prunekit.system.checkpoints import write_tensors
from prunekit.system.files import Damaged, digest, read_state, write_state

Table = tuple[tuple[float, ...], ...]


class DamagedStore(Damaged):
    """A file of the store is not what was written."""


class CandidateStore:
    """The candidates of one calibration pass, by site and kept count."""

    def __init__(self, directory: Path, key: Mapping[str, Any]) -> None:
        """Open or begin the store of the calibration pass that `key` describes.

        Raises:
            DamagedStore: the directory holds the candidates of another calibration pass.
        """
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._manifest = directory / "manifest.json"
        self._verified: set[str] = set()
        os.utime(directory)  # where stores are shared, the longest unused goes first
        if self._manifest.exists():
            self._entries = read_state(self._manifest)
            if self._entries["key"] != json.loads(json.dumps(key)):
                raise DamagedStore(
                    f"{directory} holds candidates of another calibration pass; remove it to begin again"
                )
        else:
            self._entries = {"version": 1, "key": key, "sites": {}}

    def at(self, directory: Path) -> CandidateStore:
        """A copy of its files."""
        return CandidateStore(directory, self._entries["key"])

    def __contains__(self, site: Site) -> bool:
        return site.name in self._entries["sites"]

    def errors(self, site: Site) -> list[float]:
        """Relative output error of every rung of the site, in the order they were put."""
        return list(self._entries["sites"][site.name]["errors"])

    def nats(self, site: Site) -> list[float]:
        """What every rung of the site costs, in nats per token, in the order they were put.

        Raises:
            PluginError: that was not asked for when the pass was made.
        """
        if not (found := self._entries["sites"][site.name]["nats"]):
            raise PluginError(f"{site.name} has no price in nats: who reads them has to say so in `needs` or `reads`")
        return list(found)

    def trained(self, sites: Sequence[Site]) -> int:
        """Token-forwards that training the candidates of some sites has taken."""
        return sum(self._entries["sites"][site.name].get("trained", 0) for site in sites)

    def measured(self, sites: Sequence[Site], *, scores: bool) -> tuple[Table, Table | None]:
        """(signal by signal and site by site, what the pruner said each group of each site is worth).

        Raises:
            DamagedStore: the file of a site is missing or has changed.
        """
        signals = zip(*(self._entries["sites"][site.name]["signals"] for site in sites), strict=True)
        return tuple(signals), tuple(self._scores(site) for site in sites) if scores else None

    def _scores(self, site: Site) -> tuple[float, ...]:
        with safe_open(self._intact(site), "pt") as file:
            return tuple(file.get_tensor("scores").tolist())

    def put(
        self,
        site: Site,
        candidates: Sequence[Candidate],
        errors: Sequence[float],
        signals: Sequence[float] = (),
        scores: Sequence[float] | None = None,
        *,
        keeps: Sequence[int] | None = None,
        nats: Sequence[float] = (),
        trained: int = 0,
    ) -> None:
        """Write all candidates of a site and what was measured there, then say so in the manifest.

        `keeps` are their counts; None: of the groups they keep. Errors and nats are of the rungs of a ladder, of which
        some may have no candidate. `trained`: token-forwards that training them has taken.
        """
        counts = list(keeps) if keeps is not None else [len(c.kept or ()) for c in candidates]
        tensors = dict[str, Tensor]()
        for kept, candidate in zip(counts, candidates, strict=True):
            encoded = layout_of(site).encode(site, kept, candidate.to("cpu"))
            encoded |= {_producer(i): weight for i, weight in enumerate(candidate.producers)}
            tensors |= {f"{kept}.{name}": tensor for name, tensor in encoded.items()}
        if scores is not None:
            tensors["scores"] = torch.tensor(scores, dtype=torch.float64)
        name = f"{site.name}.safetensors"
        write_tensors(self.directory / name, tensors)  # which no power cut can take after this: the manifest names it
        self._entries["sites"][site.name] = {
            "file": name,
            "sha256": digest(self.directory / name),
            "kept": counts,
            "errors": list(errors),
            "nats": list(nats),
            "signals": list(signals),
            **({"trained": trained} if trained else {}),
        }
        write_state(self._manifest, self._entries)

    def get(self, site: Site, kept: int, device: torch.device | str = "cpu") -> Candidate:
        """The candidate that keeps `kept` groups, or weights per row, with a full-width weight.

        Raises:
            KeyError: there is none.
            DamagedStore: its file is missing or has changed.
        """
        entry = self._entries["sites"][site.name]
        if kept not in entry["kept"]:
            raise KeyError(f"{site.name}: no candidate keeps {kept}; there are {entry['kept']}")
        with safe_open(self._intact(site), "pt") as file:
            found = layout_of(site).decode(site, kept, lambda name: file.get_tensor(f"{kept}.{name}"))
            names = takewhile(set(file.keys()).__contains__, (f"{kept}.{_producer(i)}" for i in count()))
            found = replace(found, producers=tuple(map(file.get_tensor, names)))
        return found.to(device)

    @staticmethod
    def read_back(site: Site, kept: int, candidate: Candidate) -> Candidate:
        """A candidate as `get` will give it when it is stored, but for producer layers."""
        encoded = layout_of(site).encode(site, kept, candidate.to("cpu"))
        return layout_of(site).decode(site, kept, encoded.__getitem__)

    @staticmethod
    def bytes(site: Site, ladder: Sequence[int], dtype: torch.dtype, *, scores: bool = False) -> int:
        """Of the file of a site with candidates of a dtype; single weights: where none that was kept is zero."""
        tensors: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
        for kept in ladder:
            stored = layout_of(site).stored(site, kept, dtype)
            tensors |= {f"{kept}.{name}": tensor for name, tensor in stored.items()}
        if scores:
            tensors["scores"] = torch.float64, [site.n_groups]
        return file_bytes(tensors)

    def _intact(self, site: Site) -> Path:
        entry = self._entries["sites"][site.name]
        path = self.directory / entry["file"]
        if site.name not in self._verified:
            if not path.exists() or digest(path) != entry["sha256"]:
                raise DamagedStore(f"{path} is missing or damaged; remove {self.directory} to prune again")
            self._verified.add(site.name)
        return path


def _producer(i: int) -> str:
    """Name of the weight of a producer layer that a candidate brings along."""
    return f"producer-{i}"
