"""The same tokens through the dense model and the small one, side by side, sub-layer by sub-layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.calibration.flow import replayed
from prunekit.data.tokens import TokenBatch
from prunekit.models.blocks import Call, Seen, chunks, entered
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.finisher import Workpiece
from prunekit.space.sites import Site
from prunekit.system.memory import Room, Row

Aim = Literal["own", "dense", "stream"]


def whole_parts(piece: Workpiece) -> Workpiece:
    """The same work seen by attention and MLP of every block, all groups of them, in place of single linear maps."""
    sites = piece.adapter.sites(piece.dense)
    counts = tuple(site.n_groups for site in sites)
    return replace(piece, sites=sites, plan=counts, kept=tuple(tuple(range(count)) for count in counts))


class Twin:
    """Calibration tokens on their way through a workpiece.

        for here in Twin(piece, piece.tokens):
            ...                      # change the weights of here.linear, or of all of here.maps

    What a sub-layer has become when the loop goes on is what the next one sees. Sub-layers that the small model has
    lost are passed by. Kept in the workpiece's room: hidden states of both streams, the outputs of the present block's
    sub-layers in both, and the dense model's inputs of the present linear map.

    Where single weights were removed, every linear map comes alone, `SubLayer.linear`; the inputs of both models are
    held, and are the same for maps that share one. `whole_parts` makes attention and MLP of them.
    """

    @torch.no_grad()
    def __init__(self, piece: Workpiece, batch: TokenBatch, *, tokens: int | None = None) -> None:
        """`tokens`: as many in one chunk; None: what suits a cache."""
        self.piece = piece
        self.dense, self.small = (
            _Lane.entering(model, piece.adapter, batch, tokens, piece.room) for model in (piece.dense, piece.model)
        )

    def __len__(self) -> int:
        """How many sub-layers it will yield."""
        return sum(map(bool, self._groups))

    @property
    def _groups(self) -> list[Sequence[int]]:
        """By site, those that are left; of a linear map, all its columns."""
        pairs = zip(self.piece.sites, self.piece.kept, strict=True)
        return [groups if site.form.shrinks else range(site.n_groups) for site, groups in pairs]

    def __iter__(self) -> Iterator[SubLayer]:
        """Every sub-layer that is left in the small model, in order of execution; once."""
        piece, sites = self.piece, zip(self.piece.sites, self._groups, strict=True)
        blocks = (piece.adapter.blocks(piece.dense), piece.adapter.blocks(piece.model))
        for index, members in groupby(sites, key=lambda member: member[0].block):
            dense, small = (those[index] for those in blocks)
            for site, groups in members:
                here = SubLayer(site, groups, dense, small, self)
                self.dense.catch(site, dense)
                if not site.form.shrinks:
                    self.small.catch(site, small)
                if groups:
                    yield here
                if piece.adapter.part(site) is not None:  # else its output goes to a map that is still to come
                    with torch.no_grad():
                        self.dense.add(site, (here.dense_linear(x) for x in self.dense.inputs))
                        self.small.add(site, (here.made(i) for i in range(len(here))) if groups else None)
            self.dense.advance(dense, index)
            self.small.advance(small, index)


@dataclass(frozen=True, eq=False)
class SubLayer:
    """Attention or MLP of one block, or a single linear map, in both models, on the tokens of a twin.

    Tokens come chunk by chunk.
    """

    site: Site
    groups: Sequence[int]  # kept ones
    dense_block: nn.Module
    block: nn.Module  # of the small model
    twin: Twin

    def __len__(self) -> int:
        """Chunks of tokens."""
        return len(self.twin.small.calls)

    @property
    def linear(self) -> nn.Linear:
        """The small model's linear map whose columns were cut."""
        return self.twin.piece.adapter.linear(self.block, self.site)

    @property
    def dense_linear(self) -> nn.Linear:
        return self.twin.piece.adapter.linear(self.dense_block, self.site)

    @property
    def maps(self) -> list[nn.Linear]:
        """All linear maps of the small sub-layer, `linear` last."""
        return self.twin.piece.adapter.maps(self.block, self.site)

    @cached_property
    def columns(self) -> Tensor:
        """Columns of the dense linear map that the small one has, in its order."""
        return torch.tensor(sorted(self.site.columns(self.groups)), device=self.linear.weight.device)

    @torch.no_grad()
    def inputs(self, i: int) -> Float[Tensor, "windows length kept"]:
        """x̂: what reaches the small linear map."""
        if not self.site.form.shrinks:
            return self.twin.small.inputs[i]
        return self.twin.small.inside(self.linear, self.site.block, self.block, i).inputs

    @torch.no_grad()
    def entering(self, i: int) -> Float[Tensor, "windows length d"]:
        """What reaches the first of `maps`: the hidden states behind the norm."""
        return self.twin.small.inside(self.maps[0], self.site.block, self.block, i).inputs

    def dense_inputs(self, i: int) -> Float[Tensor, "windows length d_in"]:
        """x: what reaches the dense linear map in the dense model."""
        return self.twin.dense.inputs[i]

    def made(self, i: int) -> Float[Tensor, "windows length d"]:
        """What the small sub-layer makes of what it sees, with its weights of now; weights that train get gradients."""
        if not self.site.form.shrinks:
            return self.linear(self.inputs(i))
        return self.twin.small.inside(self.linear, self.site.block, self.block, i).output

    @torch.no_grad()
    def wanted(self, i: int, aim: Aim) -> Float[Tensor, "windows length d"]:
        """What the small sub-layer should make, in its dtype.

        own       f(h̃)        the dense sub-layer on the hidden states h̃ of the small model; of a map, on its inputs
        dense     f(h)        the dense sub-layer in the dense model
        stream    f(h) + δ    and what the residual stream has lost before it, where a block is a sum; else f(h)
        """
        twin, dtype = self.twin, self.linear.weight.dtype
        if aim == "own" and not self.site.form.shrinks:
            return self.dense_linear(self.inputs(i).to(twin.dense.dtype)).to(dtype)
        if aim == "own":
            inside = twin.small.inside(self.dense_linear, self.site.block, self.dense_block, i, of=twin.dense)
            return inside.output.to(dtype)
        output = self.dense_linear(twin.dense.inputs[i]).to(dtype)
        joins = twin.piece.adapter.part(self.site) is not None  # its output is a term of the sum
        if aim == "stream" and joins and twin.piece.adapter.adds_up(self.block):
            output = output + twin.dense.residual(i).to(dtype) - twin.small.residual(i)
        return output


@dataclass(eq=False)
class _Lane:
    """One model's hidden states before the present block, by chunk, and what its sub-layers have made of them."""

    adapter: ModelAdapter
    room: Room
    hidden: Row
    inputs: Row  # of the present site's linear map
    shared: str = ""  # `Site.shares` of what `inputs` are
    calls: list[list[Call]] = field(default_factory=list)
    outputs: dict[Site, Row] = field(default_factory=dict)

    @classmethod
    def entering(
        cls, model: nn.Module, adapter: ModelAdapter, batch: TokenBatch, tokens: int | None, room: Room
    ) -> _Lane:
        self = cls(adapter, room, room.row(), room.row())
        for ids in chunks(batch, tokens):
            hidden, calls = entered(model, adapter, ids)
            self.hidden.append(hidden)
            self.calls.append(calls)
        return self

    def inside(self, linear: nn.Linear, index: int, block: nn.Module, i: int, of: _Lane | None = None) -> _Inside:
        """A linear map at work on chunk i; its block, of this model or of that lane's, runs no further."""
        of, seen = of or self, list[_Inside]()

        def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            shape = (*self.hidden[i].shape[:-1], -1)  # OPT flattens windows
            seen.append(_Inside(args[0].reshape(shape), output.reshape(shape)))
            raise Seen

        with linear.register_forward_hook(watch), self._replaying(block, i, of), suppress(Seen):
            of.calls[i][index](block, self.hidden[i].to(of.dtype))
        return seen[0]

    @torch.no_grad()
    def catch(self, site: Site, block: nn.Module) -> None:
        if not self.inputs or not site.shares or site.shares != self.shared:
            linear = self.adapter.linear(block, site)
            self.inputs.clear()
            self.inputs.extend(self.inside(linear, site.block, block, i).inputs for i in range(len(self.calls)))
        self.shared = site.shares

    def add(self, site: Site, outputs: Iterable[Tensor] | None) -> None:
        """The present sub-layer is done; None: it was dropped."""
        self.outputs[site] = self.room.row((torch.zeros_like(h) for h in self.hidden) if outputs is None else outputs)
        self.inputs.clear()

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden[0].dtype

    def residual(self, i: int) -> Tensor:
        """Chunk i of the sum that the present sub-layer will be added to."""
        return sum((outputs[i] for outputs in self.outputs.values()), self.hidden[i])

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        for i, calls in enumerate(self.calls):
            with self._replaying(block, i, self):
                self.hidden[i] = calls[index](block, self.hidden[i])
        self.outputs.clear()

    @contextmanager
    def _replaying(self, block: nn.Module, i: int, of: _Lane) -> Iterator[None]:
        """Within: sub-layers of the block that are done give what they made of chunk i."""
        with ExitStack() as stack:
            for site, outputs in self.outputs.items():
                if (holder := self.adapter.holder(site)) is not None:
                    output = outputs[i].to(of.dtype)
                    stack.enter_context(replayed(block.get_submodule(holder), output, self.adapter.part(site)))
            yield


@dataclass(frozen=True, eq=False)
class _Inside:
    inputs: Tensor
    output: Tensor
