"""Perplexity with its label.

There is no "the perplexity": a value without data, split, window length and count compares with nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prunekit.data.tokens import TokenBatch
from prunekit.models.modules import evaluating, text_config
from prunekit.models.paging import pager_of
from prunekit.system.memory import Room
from prunekit.system.progress import Progress

LOGITS_AT_ONCE = 2**26  # values of a forward pass; 256 MB in float32
ON_A_CPU = 2048  # tokens of one: more leave its caches, which costs up to a third of the time
ROWS_AT_ONCE = 2**24  # of these in one float32 log-softmax
HIDDEN_BYTES = 2**28  # of windows on their way through a paged model, in memory


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss over positions 1 … L-1 of every window, each target counted once."""

    value: float
    nll: float  # nats per target
    standard_error: float  # of nll, over windows; nan for one window
    windows: int
    label: str  # ppl/wikitext2-test/seq256/n256/float32
    losses: tuple[float, ...]  # nll of each window, to be paired with another model's

    def above(self, dense: Perplexity) -> tuple[float, float]:
        """Compute the rise of nll over another model's on the same windows, and its paired standard error."""
        if (self.windows, self.label.rsplit("/", 1)[0]) != (dense.windows, dense.label.rsplit("/", 1)[0]):
            raise ValueError(f"{self.label} and {dense.label} are not the same measurement")
        return _mean_and_error([a - b for a, b in zip(self.losses, dense.losses, strict=True)])

    def as_dict(self) -> dict[str, Any]:
        """For reports; without the losses of single windows."""
        return {
            "perplexity": self.value,
            "nll": self.nll,
            "standard_error": self.standard_error,
            "windows": self.windows,
            "label": self.label,
        }


@torch.no_grad()
def perplexity(
    model: nn.Module, batch: TokenBatch, *, batch_size: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Measure the perplexity of a causal language model; inf where its loss is not finite.

    Args:
        model: a causal language model, whole or paged.
        batch: its text, (windows, length) token ids.
        batch_size: windows per forward pass; None: as many as keep the logits small and the caches of a CPU of use.
        progress: what the user is told; None: nothing.
    """
    if batch.seqlen < 2 or len(batch) == 0:
        raise ValueError(f"perplexity needs windows of at least 2 tokens, not {tuple(batch.ids.shape)}")
    weight = next(model.parameters())  # of the embedding, which is always in memory
    if batch_size is None:
        vocabulary = getattr(text_config(model.config), "vocab_size", 2**15)
        batch_size = max(1, tokens_at_once(vocabulary, weight.device) // batch.seqlen)
    losses = list[float]()
    with evaluating(model), (progress or Progress()).stage(f"perplexity on {batch.source}", len(batch)) as stage:
        windows = batch.ids.split(batch_size)
        for some, logits in zip(windows, _logits(model, windows), strict=True):
            ids = some.to(weight.device)
            losses += [_loss(logits[i, :-1], ids[i, 1:]) for i in range(len(ids))]
            stage.advance(len(ids))
    # windows are of equal length, so the mean of their means weighs every target the same
    nll, error = _mean_and_error(losses)
    dtype = str(weight.dtype).removeprefix("torch.")
    label = f"ppl/{batch.source}/seq{batch.seqlen}/n{len(batch)}/{dtype}"
    return Perplexity(_exp(nll), nll, error, len(batch), label, tuple(losses))


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """Tokens of a forward pass that judges a model, unless a window is longer."""
    most = LOGITS_AT_ONCE // vocabulary
    return min(most, ON_A_CPU) if device.type == "cpu" else most


def bits_per_byte(found: Perplexity, batch: TokenBatch, tokenizer: Any) -> float:
    """Compute the loss in bits per UTF-8 byte of the text, by which models with different tokenizers compare.

    The first token of every window, which is no target, counts as much as the others on average.

    Args:
        found: the loss per token.
        batch: of which text.
        tokenizer: that of the batch; the bytes are those of the text that it gives back.
    """
    texts = (
        tokenizer.decode(part.ids.flatten().tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in batch.parts.values()
    )
    bytes_ = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return found.nll / math.log(2) * batch.n_tokens / bytes_


def _logits(model: Any, windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Logits of some windows at a time. Through a paged model all go block by block: each is read once."""
    if pager_of(model) is None:
        device = next(model.parameters()).device
        yield from (model(input_ids=some.to(device), use_cache=False).logits for some in windows)
        return
    from prunekit.models.adapters.find import adapter_for  # evaluating models that nobody will prune needs no adapter
    from prunekit.models.blocks import entered

    adapter = adapter_for(model.config.model_type)
    room, calls = Room(HIDDEN_BYTES), []
    hidden = room.row()
    for some in windows:
        state, made = entered(model, adapter, some)
        hidden.append(state)
        calls.append(made)
    for index, block in enumerate(adapter.blocks(model)):
        for i, made in enumerate(calls):
            hidden[i] = made[index](block, hidden[i])
    yield from (adapter.logits(model, state) for state in hidden)


def _loss(logits: Float[Tensor, "targets vocabulary"], ids: Int64[Tensor, " targets"]) -> float:
    """Mean loss of one window in float32, a few rows at a time."""
    rows = max(1, ROWS_AT_ONCE // logits.shape[1])
    parts = zip(logits.split(rows), ids.split(rows), strict=True)
    total = sum(float(cross_entropy(some.float(), wanted, reduction="sum")) for some, wanted in parts)
    return total / len(ids)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    if not all(map(math.isfinite, values)):
        return math.inf, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return math.fsum(values) / len(values), error


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
