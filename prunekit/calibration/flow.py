"""Tokens through a model, one block at a time.

The model itself says how its blocks are called: it runs once with blocks that only write their
arguments down. After that every block can be run alone, on any hidden states, with any weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.calibration.moments import ExpertMoments, Moments, collected
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
        self,
        model: nn.Module,
        adapter: ModelAdapter,
        batch: TokenBatch,
        *,
        dense: bool,
        room: Room | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        """`reference`: the model of the dense stream, where that is not `model`: another of the same shape."""
        self.adapter, self.blocks, self.seqlen = adapter, adapter.blocks(model), batch.seqlen
        self.dense_blocks = self.blocks if reference is None else adapter.blocks(reference)
        self.stream, self.dense = Stream.entering(model, adapter, batch, room or Room()), None
        if dense and reference is not None:
            self.dense = Stream.entering(reference, adapter, batch, room or Room())
        elif dense:
            self.dense = self.stream.copy()
        self._shared: tuple[str, Moments | None] = "", None

    @torch.no_grad()
    def received(self, site: Site, statistics: Sequence[Statistic] = ()) -> Moments:
        """Moments of what `site` receives: its gram, and those of the `statistics` that there are."""
        block = self.blocks[site.block]
        linear, (name, shared) = self.adapter.linear(block, site), self._shared
        shape = MapShape(linear.in_features, linear.out_features, shared=bool(site.input_group))
        if shared is not None and site.input_group == name:
            return shared.of_map(shape, (self._received(site, linear, i) for i in range(len(self.stream))))
        for stream in (self.stream, self.dense):
            if stream is not None:
                stream.begin(site)
        there = collected(statistics, residual=self.adapter.adds_up(block) and self.adapter.part(site) is not None)
        front = self.adapter.cuts(block, site)[:-1] if any("producers" in each.sees for each in there) else ()
        layers = {cut.path: linear_at(block, cut.path) for cut in front}
        producers = {path: MapShape(layer.in_features, layer.out_features) for path, layer in layers.items()}
        moments = Moments.empty(there, shape, linear.weight.device, producers)

        def listen(path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            moments.add_producer(path, Received(lambda: args[0], length=self.seqlen))

        with ExitStack() as listening:
            for path, layer in layers.items():
                listening.enter_context(layer.register_forward_pre_hook(partial(listen, path)))
            self.stream.inputs.extend(self.stream.caught(linear, block, site, i) for i in range(len(self.stream)))
        for i in range(len(self.stream)):
            self._add(moments, site, linear, i)
        # where nobody will ask again they are not kept: of wide maps they are large
        self._shared = (site.input_group, moments) if site.input_group else ("", None)
        return moments

    @torch.no_grad()
    def received_by_expert(self, site: Site, statistics: Sequence[Statistic] = ()) -> ExpertMoments:
        """As `received`, of every expert of a site of their neurons."""
        block = self.blocks[site.block]
        for stream in (self.stream, self.dense):
            if stream is not None:
                stream.begin(site)
        linear, there = self.adapter.linear(block, site), collected(statistics, residual=False)
        before = linear if self.dense is None else self.adapter.linear(self.dense_blocks[site.block], site)
        own, dense = by_expert(linear.weight, site), by_expert(before.weight, site)
        shape = MapShape(own[0].in_features, own[0].out_features)
        found = [Moments.empty(there, shape, linear.weight.device) for _ in own]
        self.stream.inputs.extend(self.stream.caught(linear, block, site, i) for i in range(len(self.stream)))
        for i in range(len(self.stream)):
            inputs, old = self.stream.inputs[i], None  # (windows, length, neurons, experts)
            if self.dense is not None:
                old = self.dense.caught(before, self.dense_blocks[site.block], site, i)
            for expert, moments in enumerate(found):
                other = None
                if old is not None:
                    other = Received(partial(_of_expert, old, expert), dense[expert], self.seqlen)
                moments.add(Received(partial(_of_expert, inputs, expert), own[expert], self.seqlen, None, other))
        return ExpertMoments(found)

    @torch.no_grad()
    def carry(self, site: Site, weight: Float[Tensor, "d_out d_in"] | None) -> None:
        """From here on the stream passes `site` through this weight; None: its own.

        All zeros: the sub-layer is dropped; of a map that loses single weights, its bias stays.
        """
        self.stream.pass_through(self.blocks[site.block], site, weight)
        if self.dense is not None:
            self.dense.pass_through(self.dense_blocks[site.block], site, None)

    @torch.no_grad()
    def advance(self, block: int, weights: Mapping[Site, Tensor] | None = None) -> None:
        """Send the streams through a block, in place; that of pruned layers through `weights`, where there are any, and
        not through what it was carried through site by site."""
        if weights:
            self.stream.weights.update(weights)
            self.stream.outputs.clear()
        self.stream.advance(self.blocks[block], block)
        if self.dense is not None:
            self.dense.advance(self.dense_blocks[block], block)

    @staticmethod
    def peak(tokens: int, d: int, itemsize: int, block: Sequence[tuple[int, bool, bool]], streams: int) -> int:
        """Bytes: the most that is kept at once within one block.

        `block`: of every site (values of a token that reach its map, whether its output is that of a sub-layer, whether
        others have its input too).
        Hidden states are there all the time, outputs of sub-layers until the block is done, inputs of a site until its
        outputs are; those of the dense stream only where others have them too.
        """
        most = before = 0
        for width, part, shared in block:
            before += d if part else 0
            most = max(most, streams * before + width * (streams if shared else 1))
        return tokens * itemsize * (streams * d + most)

    def _add(self, moments: Moments, site: Site, linear: nn.Linear, i: int) -> None:
        """Add chunk i of what the site has received; keep what is used again of the dense stream."""
        dense, own = self.dense, None
        if dense is not None:
            block = self.dense_blocks[site.block]
            own = dense.caught(self.adapter.linear(block, site), block, site, i)
            if site.input_group:
                dense.inputs.append(own)
        received = self._received(site, linear, i, own)
        moments.add(received)
        if dense is not None and self.adapter.part(site) is not None:
            dense.made.append(received.dense.made)

    def _received(self, site: Site, linear: nn.Linear, i: int, own: Tensor | None = None) -> Received:
        """Chunk i at a site, `own` caught of the dense stream or kept for maps that share it."""

        def at(stream: Stream, linear: nn.Linear, caught: Tensor | None, dense: Received | None = None) -> Received:
            inputs = partial(stream.inputs.__getitem__, i) if caught is None else lambda: caught
            entered = partial(stream.hidden.__getitem__, i)
            return Received(inputs, linear, self.seqlen, partial(stream.residual, i), dense, site.channels, entered)

        if self.dense is None:
            return at(self.stream, linear, None)
        before = self.adapter.linear(self.dense_blocks[site.block], site)
        return at(self.stream, linear, None, at(self.dense, before, own))


class Stream:
    """One model's hidden states before the present block, chunk by chunk, and what its sub-layers have made of them."""

    def __init__(self, adapter: ModelAdapter, calls: list[list[Call]], hidden: Iterable[Tensor], room: Room) -> None:
        """`calls`: of every block, by chunk."""
        self.adapter, self.calls, self.room = adapter, calls, room
        self.hidden = room.row(hidden)
        self.inputs = room.row()  # of the present site's linear map
        self.before = room.row()  # the sum that its output is added to, where that is not known from `outputs`
        self.made = room.row()  # what its own weight makes of them, where that is known already
        self.weights: dict[Site, Tensor | None] = {}  # of the sites that are done; None: their own
        self.outputs: dict[Site, Row] = {}  # of the sub-layers that are done

    @classmethod
    def entering(
        cls, model: nn.Module, adapter: ModelAdapter, batch: TokenBatch, room: Room, tokens: int | None = None
    ) -> Stream:
        """Before the first block. `tokens`: as many in one chunk; None: what suits a cache."""
        self = cls(adapter, [], (), room)
        for ids in chunks(batch, tokens):
            hidden, calls = entered(model, adapter, ids)
            self.hidden.append(hidden)
            self.calls.append(calls)
        return self

    def copy(self) -> Stream:
        """Another stream of the same hidden states, before a block."""
        return Stream(self.adapter, self.calls, self.hidden, self.room)

    def __len__(self) -> int:
        """Chunks."""
        return len(self.calls)

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden[0].dtype

    def begin(self, site: Site) -> None:
        """Forget what reached another site."""
        self.inputs = ExpertRow(self.room) if site.channels > 1 or site.experts else self.room.row()
        self.before.clear()

    def caught(
        self, linear: nn.Linear, block: nn.Module, site: Site, i: int, of: Stream | None = None
    ) -> Float[Tensor, "windows length ... d_in"]:
        """What reaches a linear map in chunk i; the block, of this model or of that stream's, runs no further.

        Of a token with several channels it is (windows, length, channels, d_in), of neurons of experts (windows,
        length, neurons, experts).

        Raises:
            UnsupportedModel: the map is never called.
        """
        hidden, seen = self.hidden[i], list[Tensor]()
        if of is not None:
            hidden = hidden.to(of.dtype)

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            each = args[0].shape[-2:] if site.channels > 1 or site.experts else (-1,)
            seen.append(args[0].reshape(*hidden.shape[:-1], *each))  # OPT flattens windows, and so do experts
            raise Seen

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.before.append(args[0])

        with ExitStack() as stack:
            stack.enter_context(self.replaying(block, i, of))
            if of is None and len(self.before) == i and (path := self.adapter.stream_before(site)) is not None:
                stack.enter_context(block.get_submodule(path).register_forward_pre_hook(note))
            stack.enter_context(linear.register_forward_pre_hook(catch))
            stack.enter_context(suppress(Seen))
            (self if of is None else of).calls[i][site.block](block, hidden)
            raise UnsupportedModel(f"{site.name} is never called: other code, say a fused kernel, reads its weight")
        return seen[0]

    def pass_through(self, block: nn.Module, site: Site, weight: Tensor | None) -> None:
        """The present site is done, with this weight; None: with its own."""
        self.weights[site] = weight
        if weight is None and self.made:
            self.outputs[site], self.made = self.made, self.room.row()
        elif self.inputs and self.adapter.part(site) is not None:
            linear = self.adapter.linear(block, site)
            with installed(linear, site, weight):
                self.outputs[site] = self.room.row(linear(x) for x in self.inputs)
        if not site.input_group:
            self.inputs.clear()
        self.before.clear()

    def residual(self, i: int) -> Tensor:
        """Chunk i of the sum that the present sub-layer will be added to."""
        return self.before[i] if self.before else sum((o[i] for o in self.outputs.values()), self.hidden[i])

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        """Through a block, in place."""
        for i, calls in enumerate(self.calls):
            with self.replaying(block, i):
                self.hidden[i] = calls[index](block, self.hidden[i])
        self.inputs.clear()
        self.weights.clear()
        self.outputs.clear()

    @contextmanager
    def replaying(self, block: nn.Module, i: int, of: Stream | None = None) -> Iterator[None]:
        """Within: sub-layers whose output for chunk i is known give it, others run with the weight of their site."""
        with ExitStack() as stack:
            for site, weight in self.weights.items():
                holder = self.adapter.holder(site)
                if site in self.outputs and holder is not None:
                    output = self.outputs[site][i]
                    output = output if of is None else output.to(of.dtype)
                    stack.enter_context(replayed(block.get_submodule(holder), output, self.adapter.part(site)))
                elif weight is not None:
                    stack.enter_context(installed(self.adapter.linear(block, site), site, weight))
            yield


class ExpertRow(Row):
    """What reaches the sum over experts, (windows, length, channels, experts), of which most is zero: kept is what the
    experts of each token make, (windows, length, most of a token, channels), and which they are; or neurons of them."""

    def __init__(self, room: Room) -> None:
        super().__init__(room)
        self._ids, self._width = room.row(), 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        made, ids = super().__getitem__(index), self._ids[index]
        whole = made.new_zeros(*made.shape[:-2], self._width, made.shape[-1])
        return whole.scatter_(-2, ids[..., None].long().expand_as(made), made).transpose(-1, -2)

    def __delitem__(self, index: int | slice) -> None:
        super().__delitem__(index)
        del self._ids[index]

    def clear(self) -> None:
        del self[:]

    def insert(self, index: int, value: Tensor) -> None:
        there, self._width = (value != 0).any(-2), value.shape[-1]
        ids = there.byte().argsort(dim=-1, descending=True, stable=True)[..., : max(1, int(there.sum(-1).max()))]
        made = value.transpose(-1, -2)
        super().insert(index, made.gather(-2, ids[..., None].expand(*ids.shape, made.shape[-1])))
        self._ids.insert(index, ids.to(torch.int16))


def by_expert(weight: Float[Tensor, "d_out d_in"], site: Site) -> list[nn.Linear]:
    """The maps of the experts of a site of their neurons, which are side by side in its weight."""
    found = []
    for own in weight.detach().unflatten(1, (site.experts, -1)).unbind(1):
        linear = nn.Linear(own.shape[1], own.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(own, requires_grad=False)
        found.append(linear)
    return found


def _of_expert(inputs: Float[Tensor, "windows length neurons experts"], expert: int) -> Tensor:
    return inputs[..., expert]


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
        if part in ("experts", "shared"):  # which are called with tokens, and not with windows of them
            return output.flatten(0, -2)
        return (output, None) if part == "attention" else output

    module.forward = replay
    try:
        yield
    finally:
        del module.forward
