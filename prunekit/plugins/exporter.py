"""Exporters: the files a pruned model is delivered in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Float, Int64
from torch import Tensor

from prunekit.plugins.adapter import ModelAdapter
from prunekit.space.forms import Units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Code = Literal["import", "bundled"]


@dataclass(frozen=True)
class Order:
    """What is to be exported, as far as it is known before any work."""

    adapter: ModelAdapter
    units: Units  # what is removed
    code: Code  # how a model of uneven sizes is to find its classes: after `import prunekit`, or beside its weights
    parameters: int = 0  # of the pruned model
    bytes_per_parameter: int = 2  # in the dtype of the checkpoint
    config: Any = None  # of the model that is pruned, or of the result where it is there; None: not known
    tokenizer: Any = None  # None: not known yet, or there is none
    settled: bool = False  # whether the sizes in `config` are those of the result


@dataclass(frozen=True, eq=False)
class Product:
    """A pruned model, ready to be written; only to be read."""

    model: PreTrainedModel  # of a stock class or of ours, in the dtype of the checkpoint; it may be read block by block
    tokenizer: Any = None
    report: Mapping[str, Any] = field(default_factory=dict)  # the content of report.json
    code: Code = "import"


@dataclass(frozen=True, eq=False)
class Probe:
    """What a written model must give back."""

    ids: Int64[Tensor, "windows length"]
    logits: Float[Tensor, "windows length vocabulary"]  # of the pruned model, computed in float32
    parameters: int  # tied ones counted once
    blocks: int | None = None  # bytes of blocks to hold at once, of a model that does not fit memory; None: it does


class Exporter(ABC):
    """Writes a pruned model in one format, into the folder of a result before anyone can see it.

    `place` is the file or folder there that it makes; "" for the folder itself, which transformers loads then. Every
    result has exactly one exporter of place "".
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups", "weights", "n:m"})  # that it can write

    @property
    @abstractmethod
    def place(self) -> str:
        """The name of its file or folder in a result, "" for the folder itself."""

    @abstractmethod
    def write(self, product: Product, path: Path) -> None:
        """Write the model.

        Args:
            product: the model and what belongs to it.
            path: `place` in the folder of the result, which exists; nothing beside it is touched.

        Raises:
            FileExistsError: a model is there already; old files next to new ones would be read.
        """

    @abstractmethod
    def verify(self, path: Path, probe: Probe) -> None:
        """Prove that what was written is the model that was promised.

        Raises:
            NotVerified: says what differs.
        """

    def check(self, order: Order) -> None:
        """Refuse, before any long work, what cannot be written.

        Raises:
            WrongInput: one sentence.
        """
        return  # most write everything

    def size(self, order: Order) -> int:
        """Bytes of the files, for plans."""
        return order.parameters * order.bytes_per_parameter

    def files(self, folder: Path) -> list[Path]:
        """All files in the folder of a result that it has made, as far as they are there."""
        path = folder / self.place
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
