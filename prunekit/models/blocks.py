"""A model one block at a time.

The model itself says how its blocks are called: it runs once with blocks that only write their arguments down. After
that every block can be run alone, on any hidden states, with any weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from prunekit.data.tokens import TokenBatch
from prunekit.plugins.adapter import ModelAdapter

TOKENS_AT_ONCE = 2048  # per forward of one block: what stays in a cache, and bounds the activations held


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a block besides the hidden states: positions, masks, no cache."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    adapter: ModelAdapter

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        with self.adapter.exposed(block):
            out = block(hidden, *self.args, **self.kwargs)
        return out if isinstance(out, Tensor) else out[0]


class Seen(Exception):
    """Everything of interest has been seen; the rest of the forward is not needed."""


@torch.no_grad()
def entered(
    model: nn.Module, adapter: ModelAdapter, ids: Int64[Tensor, "windows length"]
) -> tuple[Float[Tensor, "windows length d"], list[Call]]:
    """What the first block receives for `ids`, and how every block is called."""
    blocks = adapter.blocks(model)
    first: list[Tensor] = []
    calls: list[Call] = []

    def recorder(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not calls:
            first.append(hidden_states)
        calls.append(Call(args, kwargs, adapter))
        if len(calls) == len(blocks):
            raise Seen
        return adapter.answer(hidden_states)

    for block in blocks:
        block.forward = recorder  # shadows the method on this instance only
    try:
        model(ids.to(next(model.parameters()).device), use_cache=False)
    except Seen:
        pass
    finally:
        for block in blocks:
            del block.forward
    return first[0], calls


def chunks(batch: TokenBatch, tokens: int | None = None) -> Iterator[Int64[Tensor, "windows length"]]:
    """The windows of a batch, as many at once as are run together: of `tokens` tokens, at least one."""
    yield from batch.ids.split(max(1, (tokens or TOKENS_AT_ONCE) // batch.ids.shape[1]))


def forward_flops(tokens: int, weights: int, attended: int, seqlen: int) -> int:
    """Of one forward pass: two for every weight of a linear map and token, and scores and values of attention.

    `attended`: query heads times head width, summed over blocks; kernels compute the whole square of a window.
    """
    return tokens * (2 * weights + 4 * seqlen * attended)
