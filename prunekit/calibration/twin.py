"""The same tokens through the dense model and the small one, side by side, sub-layer by sub-layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.calibration.flow import Stream
from prunekit.data.tokens import TokenBatch
from prunekit.plugins.finisher import Workpiece
from prunekit.space.sites import Site

Aim = Literal["own", "dense", "stream"]


def whole_parts(piece: Workpiece) -> Workpiece:
    """The same work seen by attention and MLP of every block, all groups of them, in place of single linear maps."""
    sites = piece.adapter.sites(piece.dense)
    counts = tuple(site.n_groups for site in sites)
    return replace(piece, sites=sites, plan=counts, kept=tuple(tuple(range(count)) for count in counts))


def sub_layers(piece: Workpiece) -> Workpiece:
    """The same work seen by sub-layers: attention whose heads were narrowed is one of them, all groups of it, in the
    place of the linear maps inside."""
    whole = {(site.block, site.name): site for site in piece.adapter.sites(piece.dense)}
    found = list[tuple[Site, int, tuple[int, ...]]]()
    for site, count, groups in zip(piece.sites, piece.plan, piece.kept, strict=True):
        if site.form.coupled:
            found.append((site, count, groups))
        elif (attention := whole.get((site.block, site.name))) is not None:  # the map behind it
            found.append((attention, attention.n_groups, tuple(range(attention.n_groups))))
    sites, plan, kept = zip(*found, strict=True)
    return replace(piece, sites=sites, plan=plan, kept=kept)


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
            Stream.entering(model, piece.adapter, batch, piece.room, tokens) for model in (piece.dense, piece.model)
        )

    def __len__(self) -> int:
        """How many sub-layers it will yield."""
        return sum(map(bool, self._groups))

    @property
    def _groups(self) -> list[Sequence[int]]:
        """By site, those that are left; of a linear map, all its columns."""
        pairs = zip(self.piece.sites, self.piece.kept, strict=True)
        return [groups if site.form.coupled else range(site.n_groups) for site, groups in pairs]

    def __iter__(self) -> Iterator[SubLayer]:
        """Every sub-layer that is left in the small model, in order of execution; once."""
        piece, sites, group = self.piece, zip(self.piece.sites, self._groups, strict=True), ""
        blocks = (piece.adapter.blocks(piece.dense), piece.adapter.blocks(piece.model))
        for index, members in groupby(sites, key=lambda member: member[0].block):
            dense, small = (those[index] for those in blocks)
            for site, groups in members:
                here = SubLayer(site, groups, dense, small, self)
                if not site.input_group or site.input_group != group:
                    self._catch(here)
                group = site.input_group
                if groups:
                    yield here
                if piece.adapter.part(site) is not None:  # else its output goes to a map that is still to come
                    self._add(here)
            self.dense.advance(dense, index)
            self.small.advance(small, index)

    @torch.no_grad()
    def _catch(self, here: SubLayer) -> None:
        """Keep what reaches the linear map in the dense model; where single weights go, in the small one too."""
        pairs = [(self.dense, here.dense_linear, here.dense_block)]
        pairs += [] if here.site.form.coupled else [(self.small, here.linear, here.block)]
        for stream, linear, block in pairs:
            stream.inputs.clear()
            stream.inputs.extend(stream.caught(linear, block, here.site, i) for i in range(len(here)))

    @torch.no_grad()
    def _add(self, here: SubLayer) -> None:
        """The sub-layer is done: keep what it makes of the tokens in both models, zeros where it was dropped."""
        self.dense.pass_through(here.dense_block, here.site, None)
        outputs = map(here.made, range(len(here))) if here.groups else map(torch.zeros_like, self.small.hidden)
        self.small.weights[here.site], self.small.outputs[here.site] = None, self.piece.room.row(outputs)
        self.small.inputs.clear()


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
        return len(self.twin.small)

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

    @property
    def patch(self) -> nn.Module | None:
        """The linear map beside the small sub-layer, if there is one."""
        return self.twin.piece.adapter.patch(self.block, self.site)

    @cached_property
    def columns(self) -> Tensor:
        """Columns of the dense linear map that the small one has, in its order."""
        return torch.tensor(sorted(self.site.columns(self.groups)), device=self.linear.weight.device)

    @torch.no_grad()
    def inputs(self, i: int) -> Float[Tensor, "windows length kept"]:
        """x̂: what reaches the small linear map."""
        return self._reaching(self.linear, i)

    @torch.no_grad()
    def entering(self, i: int) -> Float[Tensor, "windows length d"]:
        """What reaches the first of `maps`: the hidden states behind the norm."""
        return self._reaching(self.maps[0], i)

    def dense_inputs(self, i: int) -> Float[Tensor, "windows length d_in"]:
        """x: what reaches the dense linear map in the dense model."""
        return self.twin.dense.inputs[i]

    def made(self, i: int) -> Float[Tensor, "windows length d"]:
        """What the small sub-layer makes of what it sees, with its weights of now; weights that train get gradients."""
        output, beside = self.linear(self._reaching(self.linear, i)), self.patch
        return output if beside is None else output + beside(self.entering(i))

    @torch.no_grad()
    def wanted(self, i: int, aim: Aim) -> Float[Tensor, "windows length d"]:
        """What the small sub-layer should make, in its dtype.

        own       f(h̃)        the dense sub-layer on the hidden states h̃ of the small model; of a map, on its inputs
        dense     f(h)        the dense sub-layer in the dense model
        stream    f(h) + δ    and what the residual stream has lost before it, where a block is a sum; else f(h)
        """
        twin, dtype = self.twin, next(self.linear.parameters()).dtype
        if aim == "own" and not self.site.form.coupled:
            return self.dense_linear(self.inputs(i).to(twin.dense.dtype)).to(dtype)
        if aim == "own":
            seen = twin.small.caught(self.dense_linear, self.dense_block, self.site, i, of=twin.dense)
            return self.dense_linear(seen).to(dtype)
        output = self.dense_linear(twin.dense.inputs[i]).to(dtype)
        joins = twin.piece.adapter.part(self.site) is not None  # its output is a term of the sum
        if aim == "stream" and joins and twin.piece.adapter.adds_up(self.block):
            output = output + twin.dense.residual(i).to(dtype) - twin.small.residual(i)
        return output

    def _reaching(self, linear: nn.Linear, i: int) -> Float[Tensor, "windows length d_in"]:
        """What reaches a map of the small sub-layer; single weights: what was caught."""
        small = self.twin.small
        return small.caught(linear, self.block, self.site, i) if self.site.form.coupled else small.inputs[i]
