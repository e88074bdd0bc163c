"""Objectives: how good an allocation is, judged by what the supernet answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int32, Int64
from torch import Tensor

from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation


@dataclass(frozen=True)
class Reads:
    """What an objective reads of the answers about one allocation; this is what is computed ahead, and planned for."""

    tokens: bool = True  # False: tables of the sites alone; such an objective is free in the ledger
    nats: bool = False  # what rungs cost in nats, `site_nats`
    depths: tuple[int, ...] = ()  # hidden states behind the first so many blocks; the last, for logits, is always kept
    top: int = 0  # of the dense model's most probable next tokens, at every position
    whole: bool = True  # the batch as it is
    by_source: bool = False  # the windows of each data set by themselves

    def joined(self, other: Reads) -> Reads:
        """What both read."""
        return Reads(
            self.tokens or other.tokens,
            self.nats or other.nats,
            tuple(sorted({*self.depths, *other.depths})),
            max(self.top, other.top),
            self.whole or other.whole,
            self.by_source or other.by_source,
        )

    def parts(self, batch: TokenBatch) -> Sequence[TokenBatch]:
        """The batches that are asked about; no tokens twice."""
        found = [batch] if self.whole else []
        found += batch.parts.values() if self.by_source else ()
        return list({part.digest: part for part in found}.values())


@dataclass(frozen=True, eq=False)
class TopLogProbs:
    """The dense model's most probable next tokens at every position."""

    ids: Int32[Tensor, "windows length k"]
    log_probs: Float[Tensor, "windows length k"]  # of the full softmax, descending


Logits = tuple[Int64[Tensor, "windows length"], Float[Tensor, "windows length vocabulary"]]
"""Token ids of some windows, and float32 logits."""


class Answers(Protocol):
    """What an objective may ask about an allocation. Iterators give a few windows at a time, always the same ones."""

    @property
    def space(self) -> Space:
        """The sites, their ladders and the budget."""
        ...

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        ...

    def site_errors(self, allocation: Allocation) -> Sequence[float]:
        """Relative output error of every site at its count."""
        ...

    def site_nats(self, allocation: Allocation) -> Sequence[float]:
        """What every site at its count costs in nats per token, to second order; `Reads.nats` asks for it."""
        ...

    def logits(self, allocation: Allocation, batch: TokenBatch) -> Iterator[Logits]:
        """Of the pruned model."""
        ...

    def dense_logits(self, batch: TokenBatch) -> Iterator[Logits]:
        """Of the dense model."""
        ...

    def dense_top(self, batch: TokenBatch, k: int) -> Iterator[TopLogProbs]:
        """The dense model's k most probable next tokens, in the pieces of `logits`."""
        ...

    def hidden(
        self, allocation: Allocation, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Float[Tensor, "windows length d"], ...]]:
        """The residual stream of the pruned model behind the first `depth` blocks, one tensor per depth."""
        ...

    def dense_hidden(
        self, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Float[Tensor, "windows length d"], ...]]:
        """The same of the dense model, in the same pieces."""
        ...

    def dense_loss(self, objective: Objective, batch: TokenBatch) -> float:
        """What an objective says of the dense model."""
        ...

    def trained(self, allocation: Allocation, batch: TokenBatch, tokens: int, rate: float) -> Answers:
        """Answers in which the model of this allocation has learnt from the first `tokens` tokens beside the batch, by
        AdamW at a rate, a window a step; what was removed stays removed. `Objective.training` asks for the text."""
        ...


class Objective(ABC):
    """Judges an allocation through the supernet's answers; lower is better."""

    @abstractmethod
    def loss(self, net: Answers, allocation: Allocation, batch: TokenBatch) -> float:
        """The loss on `batch`.

        Args:
            net: answers about any allocation of the space; it is left as it was.
            allocation: kept groups, or weights per row, by site.
            batch: windows of token ids.

        Returns:
            A number, lower is better; not finite where the allocation is broken. The same question has the same
            answer.
        """

    def reads(self, depth: int) -> Reads:
        """What `loss` reads, in a model of `depth` blocks; here logits on the whole batch."""
        return Reads()

    def training(self, judged: int) -> int:
        """Tokens a model is trained on before it is judged on so many; they are paid for three times, forwards and
        back. Here none."""
        return 0

    def check(self, batch: TokenBatch) -> None:
        """Refuse, before any long work, tokens that `loss` cannot judge on; here questions, whose windows are padded.

        Raises:
            WrongInput: says what the objective needs.
        """
        if batch.answers is not None:
            raise WrongInput(
                f"{type(self).__name__} judges on running text, and {batch.source} holds questions; "
                "take the objective task, or another data.search_dataset"
            )
