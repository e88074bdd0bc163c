"""Tokens through a model, one block at a time.

The model itself says how its blocks are called: it runs once with blocks that only write their
arguments down. After that every block can be run alone, on any hidden states, with any weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from prunekit.adapters import ModelAdapter
from prunekit.calibration.moments import Moments
from prunekit.calibration.tokens import TokenBatch
from prunekit.sites import Site

TOKENS_AT_ONCE = 8192  # per forward of one block; bounds the activations held besides the streams


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a block besides the hidden states: positions, masks, no cache."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        out = block(hidden, *self.args, **self.kwargs)
        return out if isinstance(out, Tensor) else out[0]


class _Seen(Exception):
    """Everything of interest has been seen; the rest of the forward is not needed."""


@torch.no_grad()
def entered(
    model: nn.Module, adapter: ModelAdapter, ids: Int64[Tensor, "windows length"]
) -> tuple[Float[Tensor, "windows length d"], list[Call]]:
    """What the first block receives for `ids`, and how every block is called."""
    blocks = adapter.blocks(model)
    first: list[Tensor] = []
    calls: list[Call] = []

    def recorder(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not calls:
            first.append(hidden_states)
        calls.append(Call(args, kwargs))
        if len(calls) == len(blocks):
            raise _Seen
        return hidden_states

    for block in blocks:
        block.forward = recorder  # shadows the method on this instance only
    try:
        model(ids.to(next(model.parameters()).device), use_cache=False)
    except _Seen:
        pass
    finally:
        for block in blocks:
            del block.forward
    return first[0], calls


def chunks(batch: TokenBatch) -> Iterator[Int64[Tensor, "windows length"]]:
    """The windows of a batch, as many at once as are run together."""
    yield from batch.ids.split(max(1, TOKENS_AT_ONCE // batch.ids.shape[1]))


@contextmanager
def installed(linear: nn.Linear, weight: Tensor | None) -> Iterator[None]:
    """The linear map with another weight; None leaves it. A weight of zeros silences the bias too."""
    if weight is None:
        yield
        return
    own, bias = linear.weight, linear.bias
    linear.weight = nn.Parameter(weight.to(own), requires_grad=False)
    if bias is not None and not weight.any():  # the sub-layer is dropped
        linear.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    try:
        yield
    finally:
        linear.weight, linear.bias = own, bias


class BlockFlow:
    """The calibration tokens on their way: one stream as pruned layers carry it, one dense if asked."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, adapter: ModelAdapter, batch: TokenBatch, *, dense: bool) -> None:
        self.adapter, self.blocks = adapter, adapter.blocks(model)
        entries = [entered(model, adapter, ids) for ids in chunks(batch)]
        self.calls = [calls for _, calls in entries]
        self.stream = [hidden for hidden, _ in entries]
        self.dense = list(self.stream) if dense else None
        self.carried: dict[Site, Tensor] = {}

    def carry(self, site: Site, weight: Float[Tensor, "d_out d_in"]) -> None:
        """From here on the stream passes `site` through this weight."""
        self.carried[site] = weight

    @torch.no_grad()
    def received(self, site: Site, *, cross: bool = False) -> Moments:
        """Moments of what `site` receives; the block is run as far as the site and no further."""
        linear = self.adapter.linear(self.blocks[site.block], site)
        moments = Moments.empty(site.d_in, linear.weight.device, cross=cross)
        for i in range(len(self.stream)):
            with self._pruned(site.block):
                seen = self._input(site, linear, i, self.stream[i])
            moments.add(seen)
            if cross:
                assert self.dense is not None
                moments.add_dense(self._input(site, linear, i, self.dense[i]), seen, linear.weight)
        return moments

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Send the streams through a block, in place."""
        for i, calls in enumerate(self.calls):
            if self.dense is not None:
                self.dense[i] = calls[block](self.blocks[block], self.dense[i])
            with self._pruned(block):
                self.stream[i] = calls[block](self.blocks[block], self.stream[i])

    @contextmanager
    def _pruned(self, block: int) -> Iterator[None]:
        with ExitStack() as stack:
            for site, weight in self.carried.items():
                if site.block == block:
                    stack.enter_context(installed(self.adapter.linear(self.blocks[block], site), weight))
            yield

    def _input(self, site: Site, linear: nn.Linear, i: int, hidden: Tensor) -> Float[Tensor, "tokens d_in"]:
        found: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Seen

        handle = linear.register_forward_pre_hook(catch)
        try:
            self.calls[i][site.block](self.blocks[site.block], hidden)
        except _Seen:
            pass
        finally:
            handle.remove()
        return found[0].reshape(-1, site.d_in)
