"""Exporters: the files a pruned model is delivered in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from prunekit.plugins.adapter import ModelAdapter
from prunekit.space.forms import Units
from prunekit.space.prices import Workload
from prunekit.space.sites import Kind

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
    config: Any = None  # of the model, as transformers has it: of the dense one where it is yet to be pruned
    tokenizer: Any = None  # None: not known yet, or there is none
    settled: bool = False  # whether the sizes in `config` are those of the result
    spared: frozenset[Kind] = frozenset()  # kinds of sites that stay whole in every block


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
    dtype: torch.dtype | None = None  # of the weights that the logits are of; None: that of the files


@dataclass(frozen=True, eq=False)
class Inquiry:
    """What a program that runs a written model is asked: what it expects in some windows, and how it continues one."""

    ids: Int64[Tensor, "windows length"]
    tokens: Int64[Tensor, "windows length few"]  # whose log-probabilities behind every position are wanted
    prompt: Int64[Tensor, " prompt"]
    new_tokens: int  # always the likeliest, whatever it is: an end of text is a token as others are


@dataclass(frozen=True, eq=False)
class Response:
    """What it answers."""

    logprobs: Float[Tensor, "windows length few"]  # nats, of `tokens`; NaN where the program does not tell
    likeliest: Int64[Tensor, "windows length"]  # the likeliest token behind every position
    continuation: Int64[Tensor, " new_tokens"]
    parameters: int | None = None  # that it has read, tied ones once; None: it does not tell
    tensors: int | None = None  # in the files, all of which it uses; None: it does not tell

    @staticmethod
    def read(
        logits: Float[Tensor, "windows length vocabulary"], inquiry: Inquiry
    ) -> tuple[Float[Tensor, "windows length few"], Int64[Tensor, "windows length"]]:
        """Find the log-probabilities that were asked for, and the likeliest tokens, in logits."""
        logits = logits.float()
        chosen = logits.gather(-1, inquiry.tokens) - logits.logsumexp(-1, keepdim=True)
        return chosen, logits.argmax(-1)


class Exporter(ABC):
    """Writes a pruned model in one format, into the folder of a result before anyone can see it.

    `place` is the file or folder there that it makes; "" for the folder itself, which transformers loads then. Every
    result has exactly one exporter of place "". One that names an `engine` has `answers`, and `timer` where it can.
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups", "weights", "n:m"})  # that it can write
    engine: ClassVar[str] = ""  # the program that runs its files, as users call it; "": there is none here
    modules: ClassVar[tuple[str, ...]] = ()  # that must be importable to write its files and to run them
    engine_modules: ClassVar[tuple[str, ...]] = ()  # further ones without which they are written, and not run
    install: ClassVar[str] = ""  # what pip installs for all of them, such as prunekit[onnx]
    asks_engine: ClassVar[bool] = (
        False  # whether `verify` asks the engine, where it is installed, so that a run need not
    )
    engine_python: ClassVar[str] = ""  # an environment variable that may name another Python, with the engine in it

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

    def answers(self, path: Path, inquiry: Inquiry) -> Response:
        """Ask the engine, in a process that knows nothing of the model but these files.

        Args:
            path: as of `write`.
            inquiry: what is asked.

        Raises:
            NotVerified: the files do not load, or hold tensors that are not used.
        """
        raise NotImplementedError(f"{type(self).__name__} names no engine")

    def tolerance(self, path: Path, dtype: torch.dtype | None = None) -> float:
        """How far log-probabilities may lie from those of the network that was judged, in nats, by rounding alone.

        Args:
            path: as of `write`.
            dtype: of the judged weights; None: that of the files.
        """
        return 1e-4  # float32 added up in another order

    def timer(self, path: Path) -> Callable[[Workload], tuple[int, int]] | None:
        """Open the engine in this process, to time it again and again; None: that is not possible.

        Returns:
            A function that runs a workload once and gives the nanoseconds of reading, and of decoding.

        Raises:
            NotVerified: the engine ended, here or when that function was called.
        """
        return None

    def deliver(self, folder: Path) -> str | None:
        """Send a result on, when all of it is verified and in its place; most stay where they are.

        Args:
            folder: of the result, with all its files.

        Returns:
            Where to, for the user; None: nowhere.

        Raises:
            CannotGoOn: it did not arrive; the result is where it is.
        """
        return None

    def size(self, order: Order) -> int:
        """Bytes of the files, for plans."""
        return order.parameters * order.bytes_per_parameter

    def files(self, folder: Path) -> list[Path]:
        """All files in the folder of a result that it has made, as far as they are there."""
        path = folder / self.place
        return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
