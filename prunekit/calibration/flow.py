"""Tokens through a model, one block at a time.

The model itself says how its blocks are called: it runs once with blocks that only write their
arguments down. After that every block can be run alone, on any hidden states, with any weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.calibration.moments import Moments, collected
from prunekit.data.tokens import TokenBatch
from prunekit.layer.layouts import layout_of
from prunekit.layer.statistics import MapShape, Received, Statistic
from prunekit.models.blocks import Call, Seen, chunks, entered
from prunekit.plugins.adapter import ModelAdapter, UnsupportedModel, linear_at
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
        self._shared: tuple[str, Moments | None] = "", None

    @torch.no_grad()
    def received(self, site: Site, statistics: Sequence[Statistic] = ()) -> Moments:
        """Moments of what `site` receives: its gram, and those of the `statistics` that there are."""
        block = self.blocks[site.block]
        linear, (name, shared) = self.adapter.linear(block, site), self._shared
        shape = MapShape(linear.in_features, linear.out_features, shared=bool(site.shares))
        if shared is not None and site.shares == name:
            return shared.of_map(shape, (self._received(site, linear, i) for i in range(len(self.calls))))
        for stream in (self.stream, self.dense):
            if stream is not None:
                stream.inputs.clear()  # of an input that was shared
        there = collected(statistics, residual=self.adapter.adds_up(block) and self.adapter.part(site) is not None)
        fed = self.adapter.cuts(block, site)[:-1] if any("producers" in each.sees for each in there) else ()
        layers = {cut.path: linear_at(block, cut.path) for cut in fed}
        producers = {path: MapShape(layer.in_features, layer.out_features) for path, layer in layers.items()}
        moments = Moments.empty(there, shape, linear.weight.device, producers)

        def listen(path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            moments.add_producer(path, Received(lambda: args[0], length=self.seqlen))

        with ExitStack() as listening:
            for path, layer in layers.items():
                listening.enter_context(layer.register_forward_pre_hook(partial(listen, path)))
            self.stream.inputs.extend(self._caught(self.stream, site, linear, i) for i in range(len(self.calls)))
        for i in range(len(self.calls)):
            self._add(moments, site, linear, i)
        # where nobody will ask again they are not kept: of wide maps they are large
        self._shared = (site.shares, moments) if site.shares else ("", None)
        return moments

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

    def _add(self, moments: Moments, site: Site, linear: nn.Linear, i: int) -> None:
        """Add chunk i of what the site has received; keep what is used again of the dense stream."""
        dense, own = self.dense, None
        if dense is not None:
            own = self._caught(dense, site, linear, i)
            if site.shares:
                dense.inputs.append(own)
        received = self._received(site, linear, i, own)
        moments.add(received)
        if dense is not None and self.adapter.part(site) is not None:
            dense.made.append(received.dense.made)

    def _received(self, site: Site, linear: nn.Linear, i: int, own: Tensor | None = None) -> Received:
        """Chunk i at a site, `own` caught of the dense stream or kept for maps that share it."""

        def at(stream: _Stream, caught: Tensor | None, dense: Received | None = None) -> Received:
            inputs = partial(stream.inputs.__getitem__, i) if caught is None else lambda: caught
            return Received(inputs, linear, self.seqlen, partial(stream.residual, i), dense)

        return at(self.stream, None, None if self.dense is None else at(self.dense, own))

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
