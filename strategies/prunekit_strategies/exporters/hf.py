"""The folder that transformers loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import prunekit as pk
from prunekit.export import save, verify
from prunekit.models.classes import FAMILIES
from prunekit.system.files import MODEL_FILES


@dataclass(frozen=True)
class HF(pk.Exporter):
    """Config, safetensors and tokenizer as transformers saves them, proved by loading them in a fresh process."""

    structures: ClassVar[frozenset[str]] = frozenset({"groups", "weights", "n:m", "low-rank"})

    @property
    def place(self) -> str:
        return ""

    def check(self, order: pk.Order) -> None:
        family = getattr(order.adapter, "family", None)
        if order.code == "bundled" and family is not None and FAMILIES.get(family.model_type) is not family:
            raise pk.WrongInput(
                f"the code of {family.prefix} models is not prunekit's own, so it cannot be bundled; take code=import"
            )

    def write(self, product: pk.Product, path: Path) -> None:
        save(product.model, path, product.tokenizer, code=product.code)

    def verify(self, path: Path, probe: pk.Probe) -> None:
        verify(path, probe.ids, probe.logits, probe.parameters, blocks=probe.blocks)

    def files(self, folder: Path) -> list[Path]:
        return sorted(file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file())
