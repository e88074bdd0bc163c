"""The folder that transformers loads."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

import prunekit as pk
from prunekit.export import save, verify
from prunekit.export.hub import check_repository, upload
from prunekit.export.verify import TOLERANCE, ask_transformers
from prunekit.measure.evaluate import load
from prunekit.measure.speed import timed
from prunekit.models.classes import FAMILIES
from prunekit.models.shards import SHARD_BYTES
from prunekit.space.prices import Workload
from prunekit.system.files import MODEL_FILES

ROUNDED = {"float16": 0.1, "bfloat16": 0.8}  # nats: weights have 11 and 8 bits; 0.06 and 0.22 were seen


@dataclass(frozen=True)
class HF(pk.Exporter):
    """Config, safetensors and tokenizer as transformers saves them, proved by loading them in a fresh process."""

    structures: ClassVar[frozenset[str]] = frozenset({"groups", "weights", "n:m", "low-rank", "values"})
    engine: ClassVar[str] = "transformers"
    asks_engine: ClassVar[bool] = True

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of the weights; auto: that of the checkpoint
    max_shard_size: str = SHARD_BYTES  # of the largest file of weights, as 5GB
    push_to_hub: str | None = None  # owner/name of a repository, to which the result is uploaded when it is verified

    def __post_init__(self) -> None:
        pk.check_choices(self)
        if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]B", self.max_shard_size):
            raise pk.WrongInput(
                f"max_shard_size is a number with its unit, as 500MB or 5GB, not {self.max_shard_size!r}"
            )
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub)

    @property
    def place(self) -> str:
        return ""

    def check(self, order: pk.Order) -> None:
        family = getattr(order.adapter, "family", None)
        if order.code == "bundled" and family is not None and FAMILIES.get(family.model_type) is not family:
            raise pk.WrongInput(
                f"the code of {family.prefix} models is not prunekit's own, so it cannot be bundled; take code=import"
            )
        if order.code == "bundled" and order.adapter.images and family is not None and family.text is None:
            raise pk.WrongInput(
                "transformers finds bundled code of a whole model, and not of a language model inside another; take "
                "code=import"
            )

    def write(self, product: pk.Product, path: Path) -> None:
        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        save(product.model, path, product.tokenizer, code=product.code, dtype=dtype, max_shard_size=self.max_shard_size)

    def verify(self, path: Path, probe: pk.Probe) -> None:
        allowed = self.tolerance(path, probe.dtype)
        verify(path, probe.ids, probe.logits, probe.parameters, allowed, blocks=probe.blocks)

    def answers(self, path: Path, inquiry: pk.Inquiry) -> pk.Response:
        return ask_transformers(path, inquiry)

    def tolerance(self, path: Path, dtype: torch.dtype | None = None) -> float:
        try:
            stored = json.loads((path / "config.json").read_text(encoding="utf-8"))["dtype"]
        except (OSError, ValueError, KeyError, TypeError):  # what is not there does not load
            return TOLERANCE
        exact = dtype is None or torch.promote_types(dtype, getattr(torch, stored)) == getattr(torch, stored)
        return TOLERANCE if exact else ROUNDED.get(stored, TOLERANCE)

    def timer(self, path: Path) -> Callable[[Workload], tuple[int, int]]:
        model = load(str(path))

        def run(work: Workload) -> tuple[int, int]:
            timed(model, Workload(work.batch, work.prompt, 1))  # which does not count
            return timed(model, work)

        return run

    def deliver(self, folder: Path) -> str | None:
        return None if self.push_to_hub is None else upload(folder, self.push_to_hub)

    def size(self, order: pk.Order) -> int:
        return order.parameters * (
            order.bytes_per_parameter if self.dtype == "auto" else getattr(torch, self.dtype).itemsize
        )

    def files(self, folder: Path) -> list[Path]:
        return sorted(file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file())
