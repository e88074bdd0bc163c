"""The dense model, a store of candidates, and answers about any allocation of them.

A generation of allocations is evaluated block by block over the tree of their prefixes: what two
allocations share at the start is computed once. Candidates run cut out, not masked, so a pruned
allocation costs less than the dense model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.data.tokens import TokenBatch
from prunekit.models.blocks import TOKENS_AT_ONCE, chunks, entered
from prunekit.models.modules import grafted, shallow
from prunekit.models.paging import pager_of, whole
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.guard import number, unchanged
from prunekit.plugins.objective import Answers, Logits, Objective, TopLogProbs
from prunekit.search.store import CandidateStore, Table
from prunekit.search.teacher import Teacher
from prunekit.search.trained import Trained, learn
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation
from prunekit.system.memory import SHARES, Shares, give_back

LOGITS_AT_ONCE = 1 << 22  # values, unless a window has more: larger buffers are mapped anew, page by page, on a CPU


class Supernet:
    """Errors by site and rung, and losses for the objective to compute."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: ModelAdapter,
        space: Space,
        errors: Sequence[Sequence[float]],
        store: CandidateStore,
        shares: Shares = SHARES,
        teacher: Teacher | None = None,
        dense: PreTrainedModel | None = None,
    ) -> None:
        """`teacher`: predictions of the dense model, shared with other supernets over it; None: there are no others.
        `dense`: the dense model, where candidates are of another, whose weights were trained since."""
        self.model, self.adapter, self.space, self.store, self.shares = model, adapter, space, store, shares
        self.teacher = teacher or Teacher(shares)
        self._dense_net = None if dense is None else self._of_no_site(dense)
        self.errors = tuple(tuple(row) for row in errors)
        self.blocks = adapter.blocks(model)
        ends = [sum(s.block <= b for s in space.sites) for b in range(len(self.blocks))]
        self._spans = list(zip([0, *ends[:-1]], ends, strict=True))  # sites of a block: allocation[start:end]
        self._parts: OrderedDict[tuple[int, int], dict[str, nn.Module]] = OrderedDict()
        self._parts_bytes = 0
        paged = pager_of(model) is not None  # then work goes block by block, not one allocation after another
        self._least = max((end - start for start, end in self._spans), default=0) if paged else len(space.sites)
        self._hidden: dict[tuple[Allocation | None, str, int], list[Tensor]] = {}  # chunk by chunk
        self._dense_bytes = 0

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return len(self.blocks)

    # -- the table ------------------------------------------------------------------------------------

    def site_errors(self, allocation: Allocation) -> list[float]:
        """Relative output error of the chosen rung, site by site; 0 where all groups are kept and no rung says so."""
        return self._chosen(self.errors, allocation)

    def site_nats(self, allocation: Allocation) -> list[float]:
        """What the chosen rung costs in nats per token, to second order, site by site; 0 where all groups are kept.

        Raises:
            PluginError: the pass was made without.
        """
        return self._chosen(self.nats, allocation)

    @cached_property
    def nats(self) -> Table:
        """What every rung costs in nats per token, by site."""
        return tuple(tuple(self.store.nats(site)) for site in self.space.sites)

    def table(self, space: Space, rows: Table | None = None) -> Table:
        """Relative output errors, or other rows, by site and rung of a space whose rungs are all here."""
        return tuple(
            tuple(row[ladder.index(kept)] for kept in some)
            for row, ladder, some in zip(rows or self.errors, self.space.ladders, space.ladders, strict=True)
        )

    def _chosen(self, table: Table, allocation: Allocation) -> list[float]:
        return [
            row[ladder.index(kept)] if kept in ladder else 0.0
            for row, ladder, kept in zip(table, self.space.ladders, allocation, strict=True)
        ]

    # -- tokens through the network ------------------------------------------------------------------

    def prefetch(
        self, allocations: Sequence[Allocation], batches: Sequence[TokenBatch], depths: Sequence[int] = ()
    ) -> list[Allocation]:
        """Run allocations together; `logits` and `hidden` of them on the same batches then only read.

        `depths` counts blocks; the last is always there. Earlier results are freed. As many allocations are run as
        fit the memory bound, at least one, from the first on; says which.
        """
        self._hidden = {key: value for key, value in self._hidden.items() if key[0] is None}
        depths = sorted({*depths, len(self.blocks)})
        each = sum(self._bytes_of(batch, depths) for batch in batches)
        some = list(dict.fromkeys(allocations))[: max(1, self.shares.hidden // max(1, each))]
        for batch in batches:
            for states in self._run(some, batch, depths):
                for (allocation, depth), hidden in states.items():
                    self._hidden.setdefault((allocation, batch.digest, depth), []).append(hidden)
        return some

    def judged(
        self, objective: Objective, allocations: Sequence[Allocation], batch: TokenBatch
    ) -> Iterator[tuple[Allocation, float]]:
        """Every allocation once, in order, and what the objective says of it; as many as fit are run together."""
        rest, reads = list(dict.fromkeys(allocations)), objective.reads(self.depth)
        while rest:
            trains = objective.training(batch.n_tokens)  # then another model is judged than the one that could be run
            ready = rest if trains else self.prefetch(rest, reads.parts(batch), reads.depths)
            for allocation in ready:
                yield allocation, self.loss(objective, allocation, batch)
            rest = rest[len(ready) :]

    def loss(self, objective: Objective, allocation: Allocation, batch: TokenBatch) -> float:
        """What an objective says of an allocation.

        Raises:
            PluginError: it is no number, or the objective has changed what it reads.
        """
        with unchanged(objective, model=self.model, tokens=batch.ids, hidden=self._hidden, parts=self._parts):
            return number(objective, "its loss", objective.loss(self, allocation, batch))

    def logits(self, allocation: Allocation, batch: TokenBatch) -> Iterator[Logits]:
        """(token ids, logits) of a few windows at a time, float32."""
        return chain.from_iterable(self._headed(allocation, batch))

    def dense_logits(self, batch: TokenBatch) -> Iterator[Logits]:
        """As `logits`, of the dense model."""
        if self._dense_net is not None:
            return self._dense_net.dense_logits(batch)
        return chain.from_iterable(self._headed(None, batch))

    def dense_top(self, batch: TokenBatch, k: int) -> Iterator[TopLogProbs]:
        """The dense model's k most probable next tokens, in the pieces of `logits`; computed once where the teacher
        has place for them."""
        if self._dense_net is not None:
            yield from self._dense_net.dense_top(batch, k)
            return
        k, parts = min(k, self._vocabulary), [TokenBatch(ids, batch.source) for ids in chunks(batch)]
        kept = [self.teacher.top(part.digest, k) for part in parts]
        new = [part.ids for part, pieces in zip(parts, kept, strict=True) if pieces is None]
        unkept = batch if len(new) == len(parts) else TokenBatch(torch.cat([batch.ids[:0], *new]), batch.source)
        chunk_by_chunk = self._headed(None, unkept)  # the same chunks: only the last of a batch is shorter
        for part, pieces in zip(parts, kept, strict=True):
            if pieces is not None:
                yield from pieces
                continue
            tops = [torch.log_softmax(logits, -1).topk(k) for _, logits in next(chunk_by_chunk)]
            made = [TopLogProbs(top.indices.int(), top.values) for top in tops]
            self.teacher.keep(part.digest, k, made)
            yield from made

    def hidden(
        self, allocation: Allocation, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Float[Tensor, "windows length d"], ...]]:
        """The residual stream behind the first `depth` blocks, one tensor per depth, some windows at a time."""
        return self._states(allocation, batch, depths)

    def dense_hidden(
        self, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Float[Tensor, "windows length d"], ...]]:
        """As `hidden`, of the dense model, and in the same pieces; kept as far as memory is given to it."""
        if self._dense_net is not None:
            yield from self._dense_net.dense_hidden(batch, depths)
            return
        missing = [depth for depth in depths if (None, batch.digest, depth) not in self._hidden]
        if missing and self._dense_bytes + (more := self._bytes_of(batch, missing)) <= self.shares.dense:
            for states in self._run([None], batch, missing):
                for (_, depth), hidden in states.items():
                    self._hidden.setdefault((None, batch.digest, depth), []).append(hidden)
            self._dense_bytes += more
        yield from self._states(None, batch, depths)

    def dense_loss(self, objective: Objective, batch: TokenBatch) -> float:
        """What the objective says of the dense model; computed once for a batch."""
        if self._dense_net is not None:
            return self._dense_net.dense_loss(objective, batch)
        losses = self.teacher.losses
        if (objective, batch.digest) not in losses:
            losses[objective, batch.digest] = self._of_no_site(self.model).loss(objective, (), batch)
        return losses[objective, batch.digest]

    def trained(self, allocation: Allocation, batch: TokenBatch, tokens: int, rate: float) -> Answers:
        """Answers in which the model of an allocation has learnt from the text beside `batch`, in float32 or better.

        A copy learns, so that nothing else changes; it is gone with the answers.
        """
        assert batch.lessons is not None  # drawn because the objective trains
        small = whole(self.assemble(allocation), self.model)
        nn.Module.to(small, torch.promote_types(next(small.parameters()).dtype, torch.float32))
        masks = {
            site.name: small.get_submodule(site.name).get_parameter("weight") != 0
            for site in self.space.sites
            if not site.form.shrinks
        }
        learn(small, masks, batch.lessons.first(tokens), rate)
        return Trained(self, allocation, self._of_no_site(small))

    def _of_no_site(self, model: PreTrainedModel) -> Supernet:
        """Over no sites there is one allocation, and it is the model itself."""
        nothing = Space((), (), replace(self.space.budget, by_kind=()))
        return Supernet(model, self.adapter, nothing, (), self.store, self.shares, self.teacher)

    def assemble(self, plan: Allocation) -> PreTrainedModel:
        """A smaller model: every site cut to its candidate, a probe's dense sub-layers as they are. Shares with the
        dense model what was not cut."""
        small = shallow(self.model)
        for site, ladder, kept in zip(self.space.sites, self.space.ladders, plan, strict=True):
            if kept in ladder:
                self.adapter.remove(small, site, self.store.get(site, kept))
        return small

    def rest(self) -> None:
        """Free what is kept ready; it is computed again when it is asked for."""
        self._hidden, self._dense_bytes = {}, 0
        if self._dense_net is not None:
            self._dense_net.rest()
        self._parts.clear()
        self._parts_bytes = 0
        give_back()

    # -- inside -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(
        self, allocations: Sequence[Allocation | None], batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[dict[tuple[Allocation | None, int], Tensor]]:
        """Chunk by chunk of the batch, the hidden states by allocation (None: dense) and depth."""
        for some in self._together(batch, len(allocations) * (1 + len(depths))):
            entries = [entered(self.model, self.adapter, ids) for ids in some]
            states: list[dict[Allocation | None, Tensor]] = [
                {None if a is None else (): hidden for a in allocations} for hidden, _ in entries
            ]
            found = [{(a, 0): hidden for a in allocations if 0 in depths} for hidden, _ in entries]
            for index, (start, end) in enumerate(self._spans[: max(depths)]):
                prefixes = list(dict.fromkeys(None if a is None else a[:end] for a in allocations))
                for i, (_, calls) in enumerate(entries):
                    behind: dict[Allocation | None, Tensor] = {}
                    for prefix in prefixes:
                        block = self.blocks[index] if prefix is None else self._cut(index, start, prefix[start:])
                        before = states[i][None if prefix is None else prefix[:start]]
                        behind[prefix] = calls[index](block, before)
                    states[i] = behind
                    if index + 1 in depths:
                        found[i] |= {(a, index + 1): behind[None if a is None else a[:end]] for a in allocations}
            yield from found

    def _together(self, batch: TokenBatch, states: int) -> Iterator[list[Tensor]]:
        """Chunks that go through a block before the next block does: one, and of a paged model as many as may."""
        every, many = list(chunks(batch)), 1
        if pager_of(self.model) is not None:
            each = states * self._bytes_of(batch, [0]) * TOKENS_AT_ONCE // batch.n_tokens
            many = max(1, self.shares.dense // max(1, each))
        yield from (every[start : start + many] for start in range(0, len(every), many))

    def _states(
        self, allocation: Allocation | None, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Tensor, ...]]:
        keys, home = [(allocation, batch.digest, depth) for depth in depths], next(self.model.parameters()).device
        if all(key in self._hidden for key in keys):
            found = zip(*(self._hidden[key] for key in keys), strict=True)
        else:
            run = self._run([allocation], batch, depths)
            found = (tuple(states[allocation, depth] for depth in depths) for states in run)
        for states in found:  # who compares depths finds all of them in one place
            yield tuple(state.to(home) for state in states)

    def _headed(self, allocation: Allocation | None, batch: TokenBatch) -> Iterator[Iterator[Logits]]:
        """Chunk by chunk, (token ids, logits) of a few windows at a time."""
        windows = max(1, LOGITS_AT_ONCE // (batch.seqlen * self._vocabulary))
        for ids, (states,) in zip(chunks(batch), self._states(allocation, batch, [len(self.blocks)]), strict=True):
            yield self._logits(ids.split(windows), states.split(windows))

    def _logits(self, windows: Sequence[Tensor], states: Sequence[Tensor]) -> Iterator[Logits]:
        for ids, part in zip(windows, states, strict=True):
            with torch.no_grad():
                logits = self.adapter.logits(self.model, part)
            yield ids.to(logits.device), logits.float()

    @property
    def _vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator, union-attr, arg-type]

    def _bytes_of(self, batch: TokenBatch, depths: Sequence[int]) -> int:
        width = int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator, union-attr, index]
        return batch.n_tokens * width * next(self.model.parameters()).element_size() * len(depths)

    def _cut(self, index: int, start: int, kept: Sequence[int]) -> nn.Module:
        """A block with its sites cut to `kept`; sub-layers are shared between all who keep the same."""
        changed: dict[str, nn.Module] = {}
        for i, count in enumerate(kept, start):
            if count in self.space.ladders[i]:  # else a probe's dense sub-layer
                changed |= self._part(i, count)
        return grafted(self.blocks[index], changed)

    def _part(self, i: int, kept: int) -> dict[str, nn.Module]:
        if (i, kept) not in self._parts:
            site = self.space.sites[i]
            linear = self.adapter.linear(self.blocks[site.block], site)
            candidate = self.store.get(site, kept, linear.weight.device)
            block = self.blocks[site.block]
            with unchanged(self.adapter, site.name, block=block):
                self._parts[i, kept] = self.adapter.pruned(block, site, candidate)
            self._parts_bytes += _bytes(self._parts[i, kept])
            while self._parts_bytes > self.shares.parts and len(self._parts) > self._least:
                self._parts_bytes -= _bytes(self._parts.popitem(last=False)[1])
        self._parts.move_to_end((i, kept))
        return self._parts[i, kept]


def _bytes(parts: dict[str, nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for module in parts.values() for p in module.parameters())
