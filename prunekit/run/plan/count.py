"""The stages of a run, counted from shapes, ladders and tokens: the costs are those of what costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import nn

from prunekit.calibration.fill import PRICED_AT_ONCE
from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.gradients import FISHER_TOKENS
from prunekit.calibration.moments import Moments, collected, strips
from prunekit.calibration.statistics import Cross, statistics_of
from prunekit.calibration.sublayer import chunked, token_forwards
from prunekit.layer.layouts import layout_of
from prunekit.layer.problem import judging_flops
from prunekit.layer.statistics import MapShape, Statistic
from prunekit.measure.perplexity import HIDDEN_BYTES, tokens_at_once
from prunekit.measure.samples import NEW
from prunekit.models.adapters.transformer import Transformer
from prunekit.models.blocks import TOKENS_AT_ONCE, forward_flops
from prunekit.models.spread import dealt_out
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.exporter import Order
from prunekit.plugins.metric import Runs
from prunekit.plugins.pruner import LocalPruner
from prunekit.recipe.resolve import Parts
from prunekit.recipe.schema import Recipe
from prunekit.run.plan.plan import HEARING, SEARCH, Stage
from prunekit.run.plan.rehearsal import Rehearsal
from prunekit.run.plan.trial import Trials
from prunekit.search import supernet
from prunekit.search.gated import GatedModel
from prunekit.search.lessons import BACK
from prunekit.search.store import CandidateStore
from prunekit.search.teacher import Teacher
from prunekit.search.weights import Weights
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.system.memory import Shares

FLOAT, DOUBLE = 4, 8  # bytes
CPU = torch.device("cpu")
CUSHION = 64 << 20  # bytes: what libraries take when they are first used; of a run on a tiny model 64 MB were measured
STEP = 96  # a step of writing reads all weights, and takes as long as so many tokens that are read at once
FACTORING = 6  # float64 matrices (d_out, d_in) while ranks are made: the map, whitened, its factors, what makes them
MAPS = 4  # of a sub-layer, at most: queries, keys, values and outputs
KEPT = 4  # of what comes and goes, at most one part in so many stays with the C library or lies in too small pieces
KEPT_MOST = 128 << 20  # bytes that stay at most: what is larger than 32 MiB goes back to the system at once


@dataclass(frozen=True, eq=False)
class Shape:
    """A model in numbers: of its skeleton, nothing is read."""

    model: nn.Module
    adapter: ModelAdapter
    sites: Sequence[Site]
    stored: torch.dtype
    computed: torch.dtype

    @cached_property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.adapter.blocks(self.model))

    def parameters(self, module: nn.Module) -> int:
        """Tied ones once."""
        return sum(p.numel() for p in module.parameters())

    @property
    def width(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator, union-attr]

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]

    @cached_property
    def weights(self) -> int:
        """That a token is multiplied with in all blocks."""
        return sum(map(self.adapter.multiplied, self.blocks))

    def map(self, site: Site) -> MapShape:
        """Of its linear map."""
        return MapShape(site.d_in, site.d_out, shared=bool(site.input_group))

    def producers(self, site: Site) -> dict[str, MapShape]:
        """Of the parameters whose rows go with its groups, as matrices, by name."""
        if site not in self._fed:
            block = self.blocks[site.block]
            sizes = {cut.name: cut.rows(block) for cut in self.adapter.cuts(block, site)[:-1]}
            self._fed[site] = {name: MapShape(columns, rows) for name, (rows, columns) in sizes.items()}
        return self._fed[site]

    @cached_property
    def _fed(self) -> dict[Site, dict[str, MapShape]]:
        """What `producers` has answered; the cuts of a wide block are long lists."""
        return {}

    def collected(self, site: Site, statistics: Sequence[Statistic]) -> tuple[Statistic, ...]:
        """What is added up at the site."""
        joins = self.adapter.adds_up(self.blocks[site.block]) and self.adapter.part(site) is not None
        return collected(statistics, residual=joins)

    @cached_property
    def attended(self) -> int:
        """Query heads times head width, over all blocks."""
        if not isinstance(self.adapter, Transformer):
            return 0
        blocks = (block for block in self.blocks if "attention" in self.adapter.left(block))
        return sum(query * width for query, _, width in map(self.adapter.heads, blocks))

    def forward(self, tokens: int, seqlen: int, *, head: bool, share: float = 1.0) -> int:
        """FLOPs; `share`: what is kept of the blocks."""
        inside = forward_flops(tokens, self.weights, self.attended, seqlen)
        return round(share * inside) + (2 * tokens * self.width * self.vocabulary if head else 0)


@dataclass(frozen=True, eq=False)
class Member:
    """A run under one budget, in numbers."""

    name: str  # its sparsity; "" alone
    whole: Space
    spaces: Sequence[Space]  # of every round
    searches: Sequence[Rehearsal]  # of every round
    last: Space  # what is built in the end
    wanted: bool  # there is to be a result

    @cached_property
    def freed(self) -> int:
        """Parameters that a uniform allocation removes; zeros are none."""
        sites, plan = self.whole.sites, self.whole.uniform()
        return sum(layout_of(site).freed(site, kept) for site, kept in zip(sites, plan, strict=True))

    @property
    def unlike_uniform(self) -> int:
        """Weights that candidates of another allocation may hold beyond those of the uniform one, at equal budgets.

        A group of some sites has more of its parameters in the site's own linear map, which alone is stored.
        """
        counted = [(site, kept) for site, (kept,) in zip(self.last.sites, self.last.ladders, strict=True)]
        if not all(site.form.coupled for site, _ in counted):
            return 0
        stored = sum(site.d_out * kept * site.group_size for site, kept in counted)
        most = max(site.d_out * site.group_size / site.params_per_group for site, _ in counted)
        return max(0, round(most * sum(kept * site.params_per_group for site, kept in counted)) - stored)

    def called(self, stage: str) -> str:
        """A stage that every member has."""
        return f"{stage} for {self.name}" if self.name else stage


@dataclass(frozen=True, eq=False)
class Count:
    """A recipe in numbers."""

    parts: Parts
    shape: Shape
    tokens: Mapping[str, int]  # by part
    seqlen: int
    members: Sequence[Member]
    before: Runs | None = None  # in which a metric is measured before the search
    after: Runs | None = None  # and on every result
    records: int = 0  # bytes of the small files, which hold no weights
    trials: Trials | None = None  # of the pruner; None: how long it works is not known
    together: int = 0  # layers that devices with the first one's memory work on while the next is reached; 0: none
    narrowed: int | None = None  # parameters of the narrower model, or that of fewer experts, before groups go
    first: Space | None = None  # of whole experts, where they go before; None: they do not
    device: torch.device = CPU  # the first, which judges

    @cached_property
    def everything(self) -> int:
        """Bytes of the dense model in the dtype of the computation."""
        return self.shape.parameters(self.shape.model) * self.shape.computed.itemsize

    @property
    def _whole(self) -> int:
        """Parameters of the model that groups go from: the dense one, or the narrower one, whose head may be untied."""
        return self.everything // self.shape.computed.itemsize if self.narrowed is None else self.narrowed

    @cached_property
    def block(self) -> int:
        """Bytes of the largest block."""
        return max(self._blocks)

    @cached_property
    def resident(self) -> int:
        """Bytes of what is neither in blocks nor the head."""
        return self.everything - sum(self._blocks) - self._head

    def own(self, devices: int) -> int:
        """Bytes of the blocks, and the head, that are on the fullest of so many devices when blocks are dealt out."""
        places = dealt_out(self._blocks, [torch.device("cpu", index) for index in range(devices)])
        sums = [self._head, *[0] * (devices - 1)]
        for place, size in zip(places, self._blocks, strict=True):
            sums[place.index] += size
        return max(sums)

    @cached_property
    def _blocks(self) -> list[int]:
        return [self.shape.parameters(block) * self.shape.computed.itemsize for block in self.shape.blocks]

    @cached_property
    def _head(self) -> int:
        model: Any = self.shape.model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        return 0 if head.weight is embedding.weight else self.shape.parameters(head) * self.shape.computed.itemsize

    @cached_property
    def forward(self) -> int:
        """FLOPs of a token through the smallest result and the head, one of a window."""
        share = min(self._share(member) for member in self.members)
        return self.shape.forward(self.seqlen, self.seqlen, head=True, share=share) // self.seqlen

    @property
    def recipe(self) -> Recipe:
        return self.parts.recipe

    def stages(self, shares: Shares) -> Iterator[Stage]:
        """Every stage, in order, when memory is shared out so; what the dense model has said stays to the end."""
        heard = kept = 0
        for stage in self._stages(shares):
            if stage.name == HEARING:
                heard, _ = self._heard(shares)
            kept = max(kept, min((stage.memory - self._held(shares)) // KEPT, KEPT_MOST))  # to the end, too
            yield replace(stage, memory=stage.memory + kept, shared=stage.shared + heard)

    def _stages(self, shares: Shares) -> Iterator[Stage]:
        paged, size = shares.blocks is not None, self.shape.computed.itemsize
        shape, held = self.shape, self._held(shares)
        chunk = min(max(TOKENS_AT_ONCE, self.seqlen), max(self.tokens.values()))
        working = self._activations(chunk) + CUSHION
        cast = 0 if paged or shape.stored == shape.computed else self._stored  # both are there for a moment
        yield Stage("open", held + cast + CUSHION, shares.blocks or 0, self.records, read=self._stored)
        if self.before is not None:
            yield Stage(
                "time sub-layers", self.everything + self.before.copied * size + CUSHION,
                flops=self._runs(self.before), unknown=self.before.unknown,
            )  # fmt: skip
        if (narrow := self.parts.width) is not None:
            sums = DOUBLE * shape.width * (2 * len(shape.blocks) + 1 + 5 * shape.width * narrow.turns)
            added = 2 * self.tokens["calibration"] * shape.width**2 * (2 * len(shape.blocks) + 1) * narrow.turns
            yield Stage(
                "width", held + working + sums, 0, sums // 2,
                flops=shape.forward(self.tokens["calibration"], self.seqlen, head=False) + added,
            )  # fmt: skip
        if self.first is not None:
            yield self._pass("experts", self.first, shares, held + working)
        if "gradient" in self.parts.needs:
            learnt = 2 * FLOAT * shape.weights
            yield self._back("gradients", self.tokens["calibration"], learnt, learnt, 0, shares, held + working)
        if self.parts.prices_nats(len(shape.blocks)) or "output-fisher" in self.parts.needs:
            cells, tokens = sum(site.d_out**2 for site in shape.sites), min(self.tokens["calibration"], FISHER_TOKENS)
            yield self._back(
                "fisher", tokens, FLOAT * cells, DOUBLE * cells, 2 * tokens * cells, shares, held + working
            )
        if self.parts.learner is not None:
            yield from self._lessons(shares, held + working)
        yield from self._rounds(shares, held, working)
        for number, member in enumerate(each for each in self.members if each.wanted):
            yield from self._result(member, shares, held, working, first=number == 0)

    def _runs(self, runs: Runs) -> int:
        """FLOPs."""
        return runs.count * self.shape.forward(runs.tokens, runs.seqlen, head=False)

    def _back(self, name: str, tokens: int, written: int, summed: int, added: int, shares: Shares, held: int) -> Stage:
        """A pass forwards and backwards: bytes it writes and bytes it adds up, of all blocks, and what adding costs."""
        shape = self.shape
        streams = tokens * shape.width * shape.computed.itemsize * (len(shape.blocks) + 2)
        inside, spilled = shares.split(streams)
        said = 5 * FLOAT * self.seqlen * shape.vocabulary  # logits of a window, there and back
        back = 2 * self._activations(min(max(TOKENS_AT_ONCE, self.seqlen), tokens)) + summed // len(shape.blocks)
        return Stage(
            name, held + max(said, back), (shares.blocks or 0) + inside, written, spilled,
            read=0 if shares.blocks is None else 2 * self._stored_blocks,
            flops=3 * shape.forward(tokens, self.seqlen, head=True) + added,
        )  # fmt: skip

    def _lessons(self, shares: Shares, held: int) -> Iterator[Stage]:
        """What the learner reads, for every member or for all at once, and the vectors it is answered with."""
        shape, learner, tokens = self.shape, self.parts.learner, self.tokens["search"]
        assert learner is not None
        members = [self.members] if learner.nests else [[member] for member in self.members]
        widest, heads = max(site.width for site in shape.sites), getattr(shape.model.config, "num_attention_heads", 1)
        some = min(max(TOKENS_AT_ONCE, self.seqlen), tokens)
        graph = GatedModel.graph_bytes(
            some, shape.width, widest, len(shape.blocks), heads, self.seqlen, shape.computed.itemsize
        )
        again = shares.blocks is not None or graph > shares.hidden  # then blocks run once more on the way back
        vector = FLOAT * sum(site.n_groups for site in shape.sites)
        said = 5 * FLOAT * self.seqlen * shape.vocabulary  # logits of a window, there and back
        for several in members:
            effort = learner.effort(tokens // self.seqlen, self.seqlen, len(several))
            forwards = effort.forward + effort.dense + (BACK + again) * effort.back
            back = (graph // len(shape.blocks) if again else graph) if effort.back else 0
            back += 2 * FLOAT * shape.weights if effort.taylor else 0  # of a batch, and their sum
            copied, states = self._copied
            rows = MAPS if learner.training is not None and learner.training.rank else 1  # of what adapters tell
            yield Stage(
                "learn" if len(several) > 1 else several[0].called("learn"), held + max(said, back) + copied,
                shares.blocks or 0, (effort.queries * rows * vector if effort.back else 0) + states,
                flops=shape.forward(forwards, self.seqlen, head=True),
            )  # fmt: skip

    @cached_property
    def _copied(self) -> tuple[int, int]:
        """(bytes of the copy that a learner trains, of the states of it on disk); nothing where it trains none."""
        training = None if self.parts.learner is None else self.parts.learner.training
        if training is None:
            return 0, 0
        inside = [m for block in self.shape.blocks for m in block.modules() if isinstance(m, nn.Linear)]
        adapters = training.rank * sum(m.in_features + m.out_features for m in inside)
        trained = adapters if training.rank else sum(map(self.shape.parameters, self.shape.blocks))
        known = 3 if training.optimizer == "adamw" else 2
        copied = Weights.bytes(self.shape.parameters(self.shape.model), trained, training.optimizer)
        return copied, 2 * known * FLOAT * trained

    def _rounds(self, shares: Shares, held: int, working: int) -> Iterator[Stage]:
        """A calibration pass along the rungs of all, then the search of each."""
        recipe, shape, asking = self.recipe, self.shape, held + self._asking + CUSHION
        for number, every in enumerate(self._passes):
            yield self._pass(f"prune {number + 1}", every, shares, held + working)
            if number == 0 and self.parts.searches(len(shape.blocks)):
                yield from self._hearing(shares, asking)
            for member in self.members:
                if number >= len(member.spaces):
                    continue
                search, share = member.searches[number], self._share(member)
                forwards = search.forwards
                flops, *spread = (
                    None if count is None else shape.forward(count, self.seqlen, head=True, share=share)
                    for count in (forwards, search.least, search.most)
                )
                most = "" if recipe.search_budget is None else f"at most {recipe.search_budget:,} token-forwards"
                why = most if forwards != 0 else ""
                if search.spent is not None and search.spent.by_probes:
                    why += f"; warning: {search.spent.words}"
                if forwards is None:
                    why = most or "what the allocator will ask"
                states, ready = self._searched(search, member.spaces[number], shares)
                inside = asking + self._learning(member) + states
                yield Stage(
                    member.called(f"{SEARCH} {number + 1}"), inside, (shares.blocks or 0) + ready,
                    flops=flops, unknown=why, member=member.name,
                    spread=None if search.least is None else (spread[0] or 0, spread[1] or 0),
                )  # fmt: skip

    def _hearing(self, shares: Shares, asking: int) -> Iterator[Stage]:
        """The dense model is asked what the objective reads of it, where it reads any."""
        heard, written = self._heard(shares)
        if heard + written:
            yield Stage(
                HEARING, asking, shares.blocks or 0, written, read=0 if shares.blocks is None else self._stored,
                flops=self.shape.forward(self.tokens["search"], self.seqlen, head=True),
            )  # fmt: skip

    def _result(self, member: Member, shares: Shares, held: int, working: int, *, first: bool) -> Iterator[Stage]:
        """Rebuilt, finished, measured, saved; the first measures the dense model too."""
        recipe, shape, judged = self.recipe, self.shape, self.tokens["evaluation"]
        paged, size, kept = shares.blocks is not None, shape.computed.itemsize, shares.blocks or 0
        if recipe.rebuild and member.last.ladders != self._passes[len(member.spaces) - 1].ladders:
            rebuilt = self._pass(member.called("rebuild"), member.last, shares, held + working, member.name)
            yield replace(rebuilt, disk=rebuilt.disk + member.unlike_uniform * shape.stored.itemsize)
        stays = self._whole - member.freed  # parameters
        some = min(judged, max(self.seqlen, tokens_at_once(shape.vocabulary, self.device)))
        forward = max(2 * FLOAT * some * shape.vocabulary, self._activations(some))
        hidden = min(HIDDEN_BYTES, judged * shape.width * size)
        both = held + (self._page + hidden if paged else stays * size)
        if recipe.finishers:
            own = stays * max(size, FLOAT)
            both = max(both, held + own)
            inside, spilled = shares.split(4 * self.tokens["calibration"] * shape.width * size)
            names = ", ".join(spec["name"] for spec in recipe.finishers)
            yield Stage(
                member.called("finish"), held + own + working, kept + inside, spilled=spilled,
                flops=None, unknown=names, member=member.name,
            )  # fmt: skip
        asked = self.tokens["search"] if self.parts.objective.reads(len(shape.blocks)).tokens else 0
        states, ready = self._searched(Rehearsal(asked, 1, asked), member.last, shares)  # what is built is judged once
        asking = held + self._asking + self._learning(member) + CUSHION + states
        if first and not self.parts.searches(len(shape.blocks)):  # then it is asked now
            yield from self._hearing(shares, asking)
        measuring = both + forward + CUSHION
        models = 1 + first
        times = 2 if recipe.finishers else 1  # before and after them
        small = shape.forward(times * judged + asked, self.seqlen, head=True, share=self._share(member))
        yield Stage(
            member.called("evaluate"), max(asking, measuring), kept + max(0, min(ready, asking + ready - measuring)),
            read=models * self._stored if paged else 0,
            flops=small + first * shape.forward(judged, self.seqlen, head=True), member=member.name,
        )  # fmt: skip
        if recipe.samples and not paged:
            steps = (1 + NEW) * max(recipe.samples, STEP)
            yield Stage(
                member.called("sample"), both + CUSHION,
                flops=shape.forward(steps, self.seqlen, head=True)
                + shape.forward(steps, self.seqlen, head=True, share=self._share(member)),
                member=member.name,
            )  # fmt: skip
        if self.after is not None:
            yield Stage(
                member.called("time the result"), both + CUSHION,
                flops=self._runs(self.after), unknown=self.after.unknown, member=member.name,
            )  # fmt: skip
        largest = max(p.numel() for p in shape.model.parameters()) * (size + shape.stored.itemsize)
        order = Order(shape.adapter, self.parts.units, recipe.code, stays, shape.stored.itemsize)
        streamed, saved = paged and not recipe.finishers, sum(each.size(order) for each in self.parts.exporters)
        exported = held + self._page + largest if streamed else both
        read = (2 * self._stored if streamed else 0) + (saved if recipe.verify else 0)  # for the probe, and to write
        yield Stage(member.called("export"), exported + CUSHION, kept, saved, read=read, member=member.name)

    @cached_property
    def _passes(self) -> list[Space]:
        """Of every round, the rungs of all that still search."""
        rounds = []
        for number in range(max(len(member.spaces) for member in self.members)):
            first, *others = [m.spaces[number] for m in self.members if number < len(m.spaces)]
            rounds.append(first.joined(*others))
        return rounds

    @property
    def _page(self) -> int:
        """Bytes of the largest part of the model that is read at once, and of what its experts are merged from."""
        merged = max((p.numel() for block in self.shape.blocks for p in block.parameters() if p.ndim > 2), default=0)
        return max(self.block, self._head) + 2 * merged * self.shape.stored.itemsize  # the parts, and they side by side

    def _held(self, shares: Shares) -> int:
        """Bytes of the dense model that are always in memory, and of what is read of a paged one; of those that
        are pruned in the place of it."""
        trained = len(self.members) * self.everything if self._copied[0] else 0
        if self.narrowed is not None:
            trained += self.narrowed * self.shape.computed.itemsize
        return trained + (self.everything if shares.blocks is None else self.resident + self._page)

    def _activations(self, tokens: int) -> int:
        """Bytes of what a block makes of so many tokens at once."""
        widest = max(site.width for site in self.shape.sites)
        return tokens * self.shape.computed.itemsize * (3 * widest + 6 * self.shape.width)

    @property
    def _asking(self) -> int:
        """Bytes that come and go while an allocation is judged: activations, then logits and what is made of them."""
        tokens = min(self.tokens["search"], TOKENS_AT_ONCE)
        some = max(self.seqlen, min(tokens, supernet.LOGITS_AT_ONCE // self.shape.vocabulary))
        return max(self._activations(max(tokens, self.seqlen)), 3 * FLOAT * some * self.shape.vocabulary)

    def _learning(self, member: Member) -> int:
        """Bytes of a copy that learns before it is judged, in float32, with what AdamW knows; 0 where none does."""
        if not self.parts.objective.training(self.tokens["search"]):
            return 0
        shape = self.shape
        stays = self._whole - member.freed
        kept = 2 * len(shape.blocks) * self._activations(self.seqlen)  # on the way there, for the way back
        return 4 * FLOAT * stays + kept + 4 * FLOAT * self.seqlen * shape.vocabulary

    @property
    def _stored(self) -> int:
        """Bytes of the checkpoint."""
        return self.everything // self.shape.computed.itemsize * self.shape.stored.itemsize

    @property
    def _stored_blocks(self) -> int:
        return sum(self._blocks) // self.shape.computed.itemsize * self.shape.stored.itemsize

    def _share(self, member: Member) -> float:
        """What a uniform allocation keeps of the blocks."""
        return 1 - member.freed * self.shape.computed.itemsize / sum(self._blocks)

    def _heard(self, shares: Shares) -> tuple[int, int]:
        """(bytes in memory, bytes on disk) of what the objective reads of the dense model on all search tokens.

        Questions on fewer add less than a chunk each.
        """
        top = self.parts.objective.reads(len(self.shape.blocks)).top
        said = Teacher.bytes(self.tokens["search"], top, self.shape.vocabulary)
        inside = min(said, shares.teacher)
        return inside, min(said - inside, shares.teacher_disk)

    def _searched(self, search: Rehearsal, space: Space, shares: Shares) -> tuple[int, int]:
        """(bytes of the states that go through a block together, bytes that are kept ready) while a search asks."""
        if search.forwards == 0:
            return 0, 0
        shape, reads, tokens = self.shape, self.parts.objective.reads(len(self.shape.blocks)), self.tokens["search"]
        each = shape.width * shape.computed.itemsize  # bytes of a token's state
        one = tokens * each * len({*reads.depths, len(shape.blocks)})
        hidden = shares.hidden if search.together is None else min(shares.hidden, one * search.together // tokens)
        dense = min(shares.dense, tokens * each * (len(reads.depths) if shares.blocks is None else 2))
        parts = 0
        for i, (site, ladder) in enumerate(zip(space.sites, space.ladders, strict=True)):
            asked = [kept for kept in ladder if search.rungs is None or (i, kept) in search.rungs]
            maps = [shape.map(site), *shape.producers(site).values()]
            whole, layout = sum(each.d_in * each.d_out for each in maps), layout_of(site)
            if site.experts:  # their other matrices are no linear maps
                whole = site.parameters(site.n_groups)
            parts += sum(whole - layout.freed(site, kept) for kept in asked) * shape.computed.itemsize
        most = max(1, hidden // one) if search.allocations is None else search.allocations
        chunk = min(max(TOKENS_AT_ONCE, self.seqlen), tokens)
        return 2 * min(most, max(1, hidden // one)) * chunk * each, hidden + dense + min(shares.parts, parts)

    def _pass(self, name: str, space: Space, shares: Shares, held: int, member: str = "") -> Stage:
        """`held`: bytes in memory beside what a site takes."""
        shape, needs, tokens = self.shape, self.parts.needs, self.tokens["calibration"]
        statistics = statistics_of(needs)
        search, depth = not name.startswith("rebuild"), len(shape.blocks)
        scores = search and "scores" in self.parts.allocator.needs
        alone, nats = search and self.parts.prices_alone(depth), self.parts.prices_nats(depth)
        at_once = alone and type(self.parts.pruner).nested is not LocalPruner.nested
        centre = dict(zip(space.sites, space.nearest(space.uniform()), strict=True))
        size, streams = shape.computed.itemsize, 1 + any("dense" in each.sees for each in statistics)
        stated = solved = disk = spill = doubles = trained = 0
        trains, paged = "sub-layer" in self.parts.pruner.needs, shares.blocks is not None
        took: float | None = 0.0  # by the pruner, if it was tried
        twice = self.parts.pruner.within == "block" and self.recipe.carry != "dense"  # dense, and pruned to the next
        flops, adding = self._adding(space, statistics)
        flops += (streams + twice) * shape.forward(tokens, self.seqlen, head=False)
        for _, members in groupby(space.sites, key=lambda site: site.block):
            block = [(s.kept_width, shape.adapter.part(s) is not None, bool(s.input_group)) for s in members]
            spill = max(spill, BlockFlow.peak(tokens, shape.width, size, block, streams))
        for place, rungs in zip(space.sites, space.ladders, strict=True):
            site, times = place.one, place.experts or 1  # neurons of experts are as many problems, all there together
            ladder, middle = [count * place.tile for count in rungs], centre[place] * place.tile
            own, there, fed = shape.map(site), shape.collected(place, statistics), shape.producers(place)
            d_out, paired = own.d_out, Cross.by_pairs(own)
            moments = times * Moments.bytes(there, own, fed)
            if paired and streams == 2:
                moments += DOUBLE * site.d_in * d_out  # what is made of the pairs
            # the weight of every rung as proposed and as rounded, or rounded and twice to be written; mean in float64
            each = max(size + shape.stored.itemsize, 3 * shape.stored.itemsize)
            factored = site.form.shrinks and not site.form.coupled
            if factored:  # and the product of two factors
                each += 2 * FLOAT
            kept = (middle,) if alone else ladder
            asked = kept if at_once else ladder
            there_at_once = ladder[:PRICED_AT_ONCE] if alone else ladder  # with other options a pruner may not nest
            tried = None if self.trials is None else self.trials.seconds(site, fed, ladder, kept if alone else None)
            took = None if took is None or tried is None else took + times * tried
            weights = times * site.d_in * d_out * (len(there_at_once) * each + 2 * DOUBLE + 2 * size)
            # sums and what is added to them, or their means where they are shared; then means alone
            made = (site.d_in if paired else d_out) if streams == 2 else 0
            beside = moments if site.input_group else FLOAT * site.d_in * max(next(strips(site.d_in)).stop, made)
            matrices = max(self.parts.pruner.matrices, 3 * nats)  # candidates are priced with H damped, by its factor
            solve = matrices * DOUBLE * site.d_in**2
            stated, solved = max(stated, moments + beside), max(solved, moments + weights + solve)
            if factored:
                weights += FACTORING * DOUBLE * site.d_in * d_out
            if nats:
                weights += 3 * DOUBLE * d_out**2 + DOUBLE * site.d_in * d_out
            disk += CandidateStore.bytes(place, (centre[place],) if alone else rungs, shape.stored, scores=scores)
            if trains:
                sent, work, grown, held_too = self._training(site, asked)
                trained, flops = trained + sent, flops + work
                solved = max(solved, moments + weights + max(solve, held_too) + len(there_at_once) * each * grown)
                disk += sum(grown * kept_ // site.n_groups for kept_ in kept) * shape.stored.itemsize
            cross = "cross" in needs and site.form.coupled
            widths = [layout_of(site).width(site, count) if cross else site.d_in for count in asked]
            doubles += times * judging_flops(site.d_in, d_out, widths, cross=cross)
            if nats:  # the factor weighed once, or every candidate
                once = 2 * d_out**2 * site.d_in
                many = len(asked) * once + judging_flops(site.d_in, d_out, [site.d_in] * len(asked), cross=True)
                doubles += times * (once if at_once else many)
        memory = stated + self.together * solved if self.together and not (trains or paged) else max(stated, solved)
        inside, spilled = shares.split(spill)
        read = self._stored_blocks if paged else 0
        unknown = "" if took is not None else f"the work of {self.recipe.pruner['name']} itself"
        return Stage(
            name, held + memory, (shares.blocks or 0) + inside, disk, spilled, read, flops, doubles,
            adding + (took or 0.0), unknown, member=member, trained=trained,
        )  # fmt: skip

    def _adding(self, space: Space, statistics: Sequence[Statistic]) -> tuple[int, float]:
        """(FLOPs, seconds) of adding up statistics: seconds of those that were tried, FLOPs of the others."""
        shape, flops, seconds = self.shape, 0, 0.0
        for place in space.sites:
            own, there, fed = shape.map(place.one), shape.collected(place, statistics), shape.producers(place)
            count = Moments.flops(there, own, fed, self.tokens["calibration"] * place.one.channels)
            count *= place.experts or 1
            pace = None if self.trials is None else self.trials.adding(there, own, fed, shape.computed)
            flops, seconds = (flops + count, seconds) if pace is None else (flops, seconds + count / pace)
        return flops, seconds

    def _training(self, site: Site, counts: Sequence[int]) -> tuple[int, int, int, int]:
        """What a pruner that trains the sub-layer of a site takes for some counts.

        Returns:
            Token-forwards; FLOPs; weights of all producer layers, which candidates bring along; bytes of one that
            trains: its weights, the best of them, slopes and what an optimizer knows, and the activations of a chunk.
        """
        shape, tokens = self.shape, self.tokens["calibration"]
        chunks = chunked(tokens // self.seqlen, self.seqlen)
        effort = self.parts.pruner.effort(chunks, self.seqlen)
        some = [count for count in counts if 0 < count < site.n_groups] if effort.queries else []
        each = replace(effort, forward=effort.forward + tokens)  # and judged on all
        every = replace(each, forward=len(some) * each.forward, back=len(some) * each.back)
        sent, passed = token_forwards(every, site, shape.weights), each.forward + BACK * each.back
        front = sum(fed.d_in * fed.d_out for fed in shape.producers(site).values())
        whole = front + site.d_in * site.d_out
        attended = 2 * self.seqlen * site.d_in if site.kind == "attention" else 0
        kept = sum(count / site.n_groups for count in some)
        dense = len(some) * site.d_in * site.d_out  # the dense map, for what is wanted
        flops = round(2 * passed * (kept * (whole + attended) + dense))
        training = 5 * FLOAT * whole + 4 * self._activations(max(chunks, default=0) * self.seqlen)
        return sent, flops, front, training
