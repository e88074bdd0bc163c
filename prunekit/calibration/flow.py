"""Tokens through a model, one block at a time.

The model itself says how its blocks are called: it runs once with blocks that only write their
arguments down. After that every block can be run alone, on any hidden states, with any weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.calibration.moments import Moments
from prunekit.data.tokens import TokenBatch
from prunekit.layer.layouts import layout_of
from prunekit.models.blocks import Call, Seen, chunks, entered
from prunekit.plugins.adapter import ModelAdapter, UnsupportedModel
from prunekit.space.sites import Site
from prunekit.system.memory import Room, Row


class BlockFlow:
    """The calibration tokens on their way: one stream as pruned layers carry it, one dense if asked.

    Every sub-layer runs once. Its run ends where the site's linear map begins; when the weight to carry
    is known, the map is applied to what was caught there, and the sub-layer is replayed from then on.
    Sites come in order of execution. Those with one input come one after the other and share what was caught:
    no weight carried by one of them is in front of another. Activations are kept in `room`.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, adapter: ModelAdapter, batch: TokenBatch, *, dense: bool, room: Room | None = None
    ) -> None:
        room = room or Room()
        self.adapter, self.blocks, self.seqlen = adapter, adapter.blocks(model), batch.seqlen
        self.stream, self.calls = _Stream(room), list[list[Call]]()
        for ids in chunks(batch):
            hidden, calls = entered(model, adapter, ids)
            self.stream.hidden.append(hidden)
            self.calls.append(calls)
        self.dense = _Stream(room, self.stream.hidden) if dense else None
        self._shared: tuple[str, Moments] = "", Moments.empty(0, torch.device("cpu"))

    @torch.no_grad()
    def received(self, site: Site, needs: frozenset[str] = frozenset()) -> Moments:
        """Moments of what `site` receives, with those of the dense stream where there is one.

        What costs more is added up when `needs` names it: absolute; relative; power, of what the feeders receive;
        influence.
        """
        block = self.blocks[site.block]
        linear, part = self.adapter.linear(block, site), self.adapter.part(site)
        if site.shares and site.shares == self._shared[0]:
            moments = replace(self._shared[1], power=0.0, related=None)  # these are of the map, not of what it receives
            for seen in self.stream.inputs if "relative" in needs else ():
                moments.add_relative(seen.flatten(0, -2), linear(seen).flatten(0, -2))
            for dense in self.dense.inputs if self.dense is not None else ():
                moments.add_power(less_bias(linear(dense), linear).flatten(0, -2))
            return moments.made(linear.weight)
        for stream in (self.stream, self.dense):
            if stream is not None:
                stream.inputs.clear()  # of an input that was shared
        moments = Moments.empty(site.d_in, linear.weight.device)

        def listen(feeder: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            moments.add_fed(feeder, args[0].flatten(0, -2))

        with ExitStack() as listening:
            for cut in self.adapter.cuts(block, site)[:-1] if "power" in needs else ():
                feeder = block.get_submodule(cut.path)
                listening.enter_context(feeder.register_forward_pre_hook(partial(listen, cut.path)))
            self.stream.inputs.extend(self._caught(self.stream, site, linear, i) for i in range(len(self.calls)))
        for i, seen in enumerate(self.stream.inputs):
            moments.add(seen.flatten(0, -2))
            if "absolute" in needs:
                moments.add_absolute(seen.reshape(-1, self.seqlen, site.d_in))
            if "relative" in needs:
                moments.add_relative(seen.flatten(0, -2), linear(seen).flatten(0, -2))
            if "influence" in needs and part is not None:
                moments.add_influence(self.stream.residual(i).flatten(0, -2), linear(seen).flatten(0, -2))
            if self.dense is not None:
                self._compare(moments, site, linear, i, self.dense)
        # where nobody will ask again they are not kept: of wide maps they are large
        self._shared = (site.shares, moments) if site.shares else self._shared
        return moments.made(linear.weight)

    @torch.no_grad()
    def carry(self, site: Site, weight: Float[Tensor, "d_out d_in"] | None) -> None:
        """From here on the stream passes `site` through this weight; None: its own.

        All zeros: the sub-layer is dropped; of a map that loses single weights, its bias stays.
        """
        linear = self.adapter.linear(self.blocks[site.block], site)
        feeds = self.adapter.part(site) is None
        self.stream.pass_through(site, linear, weight, feeds=feeds)
        if self.dense is not None:
            self.dense.pass_through(site, linear, None, feeds=feeds)

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Send the streams through a block, in place."""
        for stream in (self.stream, self.dense):
            if stream is None:
                continue
            for i, calls in enumerate(self.calls):
                with stream.replaying(self.adapter, self.blocks[block], i):
                    stream.hidden[i] = calls[block](self.blocks[block], stream.hidden[i])
            stream.leave()

    @staticmethod
    def peak(tokens: int, d: int, itemsize: int, block: Sequence[tuple[int, bool, bool]], streams: int) -> int:
        """Bytes: the most that is kept at once within one block.

        `block`: of every site (d_in, whether its output is that of a sub-layer, whether others have its input too).
        Hidden states are there all the time, outputs of sub-layers until the block is done, inputs of a site until its
        outputs are; those of the dense stream only where others have them too.
        """
        most = before = 0
        for d_in, part, shared in block:
            before += d if part else 0
            most = max(most, streams * before + d_in * (streams if shared else 1))
        return tokens * itemsize * (streams * d + most)

    def _compare(self, moments: Moments, site: Site, linear: nn.Linear, i: int, dense: _Stream) -> None:
        """Add what the dense stream has in chunk i of what the site has received; keep what is used again."""
        seen, own = self.stream.inputs[i].flatten(0, -2), self._caught(dense, site, linear, i)
        made = linear(own)
        if by_pairs(site, linear.out_features):
            moments.add_paired(own.flatten(0, -2), seen)
            moments.add_power(less_bias(made, linear).flatten(0, -2))
        else:
            moments.add_made(less_bias(made, linear).flatten(0, -2), seen)
        if site.shares:
            dense.inputs.append(own)
        if self.adapter.part(site) is not None:
            moments.add_drift((dense.residual(i) - self.stream.residual(i)).flatten(0, -2), seen)
            dense.made.append(made)

    def _caught(self, stream: _Stream, site: Site, linear: nn.Linear, i: int) -> Float[Tensor, "windows length d_in"]:
        """What reaches the linear map in chunk i; the block runs as far as that and no further."""
        block, seen = self.blocks[site.block], list[Tensor]()

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise Seen

        with stream.replaying(self.adapter, block, i), linear.register_forward_pre_hook(catch), suppress(Seen):
            self.calls[i][site.block](block, stream.hidden[i])
            raise UnsupportedModel(f"{site.name} is never called: other code, say a fused kernel, reads its weight")
        return seen[0]


class _Stream:
    """Hidden states before the present block, chunk by chunk, and what its sub-layers have made of them."""

    def __init__(self, room: Room, hidden: Iterable[Tensor] = ()) -> None:
        self.hidden = room.row(hidden)
        self.inputs = room.row()  # of the site that is being pruned
        self.made = room.row()  # what its own weight makes of them, where that is known already
        self.weights: dict[Site, Tensor | None] = {}
        self.outputs: dict[Site, Row] = {}

    def pass_through(self, site: Site, linear: nn.Linear, weight: Tensor | None, *, feeds: bool) -> None:
        self.weights[site] = weight
        if weight is None and self.made:
            self.outputs[site], self.made = self.made, self.inputs.room.row()
        elif self.inputs and not feeds:
            with installed(linear, site, weight):
                self.outputs[site] = self.inputs.room.row(linear(x) for x in self.inputs)
        if not site.shares:
            self.inputs.clear()

    def residual(self, i: int) -> Tensor:
        """Chunk i of the sum that the present sub-layer will be added to."""
        return sum((outputs[i] for outputs in self.outputs.values()), self.hidden[i])

    def leave(self) -> None:
        self.inputs.clear()
        self.weights.clear()
        self.outputs.clear()

    @contextmanager
    def replaying(self, adapter: ModelAdapter, block: nn.Module, i: int) -> Iterator[None]:
        """Within: sub-layers whose output for chunk i is known give it, others run with the carried weight."""
        with ExitStack() as stack:
            for site, weight in self.weights.items():
                holder = adapter.holder(site)
                if site in self.outputs and holder is not None:
                    module, output = block.get_submodule(holder), self.outputs[site][i]
                    stack.enter_context(replayed(module, output, adapter.part(site)))
                else:
                    stack.enter_context(installed(adapter.linear(block, site), site, weight))
            yield


def by_pairs(site: Site, d_out: int) -> bool:
    """Whether Σ y x̂ᵀ comes of Σ x x̂ᵀ, which maps of one input share, because it is the larger product."""
    return bool(site.shares) or d_out > site.d_in


def less_bias(made: Tensor, linear: nn.Linear) -> Tensor:
    """W x of what a linear map has made of x."""
    return made if linear.bias is None else made - linear.bias


@contextmanager
def installed(linear: nn.Linear, site: Site, weight: Tensor | None) -> Iterator[None]:
    """The linear map of a site with another weight; None leaves it. Zeros silence the bias where a sub-layer drops."""
    if weight is None:
        yield
        return
    own = dict(linear._parameters)  # as they are: asked for, those of a paged model would be in memory for good
    linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)
    if linear.bias is not None and layout_of(site).drops(weight):
        linear.bias = nn.Parameter(torch.zeros_like(linear.bias), requires_grad=False)
    try:
        yield
    finally:
        linear._parameters.update(own)


@contextmanager
def replayed(module: nn.Module, output: Tensor, part: str | None) -> Iterator[None]:
    """Within: the module of a part gives `output`, whatever it is called with."""

    def replay(*_: Any, **__: Any) -> Any:
        return (output, None) if part == "attention" else output

    module.forward = replay
    try:
        yield
    finally:
        del module.forward
