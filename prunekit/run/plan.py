"""What a run will take on this machine, before any work: memory, disk and time of every stage.

Bytes and products are counted from shapes, ladders and tokens. Every formula stands alone, so that tests hold it to
what is really taken. What nobody can know before, the time of a pruner or of a search that goes on until it is
content, is said to be unknown.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.calibration.flow import by_pairs
from prunekit.calibration.moments import strips
from prunekit.data.draws import LONGEST_WINDOW
from prunekit.data.windows import DEFAULTS
from prunekit.errors import WrongInput
from prunekit.measure.perplexity import HIDDEN_BYTES, LOGITS_AT_ONCE
from prunekit.models.adapters.transformer import Transformer
from prunekit.models.blocks import TOKENS_AT_ONCE
from prunekit.models.opening import DTYPES, resolved_devices
from prunekit.models.shards import file_bytes
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.allocator import Allocator, Journal, Problem, Query
from prunekit.plugins.exporter import Order
from prunekit.plugins.metric import MeasuredMetric, Runs
from prunekit.plugins.registry import ALLOCATORS, EXPORTERS, METRICS, OBJECTIVES, PRUNERS, signals_of
from prunekit.recipe.schema import Recipe
from prunekit.run.workplace import written
from prunekit.search.conversation import Known
from prunekit.space.forms import Structure
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.system.memory import Shares, amount, available, parsed

FLOAT, DOUBLE = 4, 8  # bytes
SPARE = 0.9  # of what is free on the machine; the rest is for others
PATIENCE = 2.0  # seconds that a search is rehearsed
CUSHION = 64 << 20  # bytes: what libraries hold, and tensors that come and go
HEARING = "dense model"  # a stage of nobody's own: the first question waits for it

# -- formulas -----------------------------------------------------------------------------------------


def moments_bytes(
    d_in: int,
    d_out: int,
    needs: Iterable[str] = (),
    *,
    part: bool = True,
    paired: bool = False,
    fed: Sequence[int] = (),
) -> int:
    """Of `Moments` of one site in float64: means, second moments, and what `needs` adds.

    `part`: its output is that of a sub-layer. `paired`: its input is paired with the dense model's. `fed`: widths of
    the inputs of its feeders.
    """
    needs, values = set(needs), d_in + d_in**2
    if {"cross", "drift"} & needs:
        values += d_out * d_in * (2 if part else 1) + (d_in**2 if paired else 0)
    values += d_in * len({"absolute", "relative"} & needs) + (sum(fed) if "power" in needs else 0)
    return DOUBLE * values


def store_bytes(site: Site, d_out: int, ladder: Sequence[int], dtype: torch.dtype, *, scores: bool = False) -> int:
    """Of a site's file of candidates; single weights: where no weight that was kept is zero by chance."""
    tensors: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for count in ladder:
        if site.kind == "linear":
            tensors[f"{count}.mask"] = torch.uint8, [-(-d_out * site.d_in // 8)]
            tensors[f"{count}.values"] = dtype, [count * d_out]
        else:
            tensors[f"{count}.kept"] = torch.int32, [count]
            tensors[f"{count}.weight"] = dtype, [d_out, count * site.group_size]
    if scores:
        tensors["scores"] = torch.float64, [site.n_groups]
    return file_bytes(tensors)


def activations_bytes(tokens: int, d: int, itemsize: int, block: Sequence[tuple[int, bool, bool]], streams: int) -> int:
    """The most a `BlockFlow` keeps at once within one block.

    `block`: of every site (d_in, whether its output is that of a sub-layer, whether others have its input too). Hidden
    states are there all the time, outputs of sub-layers until the block is done, inputs of a site until its outputs
    are; those of the dense stream only where others have them too.
    """
    most = before = 0
    for d_in, part, shared in block:
        before += d if part else 0
        most = max(most, streams * before + d_in * (streams if shared else 1))
    return tokens * itemsize * (streams * d + most)


def top_bytes(tokens: int, top: int, vocabulary: int) -> int:
    """Of the dense model's most probable tokens at every position: an id in int32, a logarithm in float32."""
    return tokens * min(top, vocabulary) * 2 * FLOAT


def forward_flops(tokens: int, weights: int, attended: int, seqlen: int) -> int:
    """Of one forward pass: two for every weight of a linear map and token, and scores and values of attention.

    `attended`: query heads times head width, summed over blocks; kernels compute the whole square of a window.
    """
    return tokens * (2 * weights + 4 * seqlen * attended)


def moments_flops(
    tokens: int, d_in: int, d_out: int, needs: Iterable[str] = (), *, part: bool = True, paired: bool = False
) -> int:
    """Of adding up the moments of one site."""
    own = sum((strip.stop - strip.start) * strip.stop for strip in strips(d_in))
    if {"cross", "drift"} & set(needs):
        own += d_in**2 if paired else d_in * d_out
        own += d_in * d_out if part else 0
    return 2 * tokens * own


def judging_flops(d_in: int, d_out: int, widths: Iterable[int], *, cross: bool) -> int:
    """Of the relative errors of candidates with so many columns, in float64, and the energy they are relative to.

    With the dense model beside them that is known, and columns that are gone cost nothing; else most may differ.
    """
    return 2 * d_out * (sum(width**2 for width in widths) if cross else d_in**2 * (1 + len(list(widths))))


# -- what there is ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Measured on this machine in a second or two."""

    flops: float  # of matrix products in the dtype of the computation, per second
    doubles: float  # of those in float64
    read: float  # bytes per second from the disk that holds the output
    write: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, folder: Path) -> Rates:
        """A square product, and a file written, dropped from the cache and read again."""
        flops, doubles = (_rate(torch.randn(1024, 1024, device=device).to(kind)) for kind in (dtype, torch.float64))
        block, count = os.urandom(1 << 20), 64
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".prunekit-") as file:
            begun = time.perf_counter()
            for _ in range(count):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            write = count * len(block) / (time.perf_counter() - begun)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begun = time.perf_counter()
            while file.read(1 << 20):
                pass
            read = count * len(block) / (time.perf_counter() - begun)
        return cls(flops, doubles, read, write)


@dataclass(frozen=True)
class Stage:
    """What one part of a run takes. Memory is beside what the process itself holds."""

    name: str
    memory: int  # bytes that it cannot do without
    shared: int = 0  # bytes it makes use of beyond, of what bounds allow
    disk: int = 0  # bytes that are written
    read: int = 0  # bytes that are read
    flops: int | None = 0  # in the dtype of the computation; None: nobody knows
    doubles: int = 0  # in float64
    unknown: str = ""  # what else takes time
    member: str = ""  # of a family, by its sparsity, that has this stage to itself

    def seconds(self, rates: Rates) -> float | None:
        """How long that takes; None: nobody knows."""
        if self.flops is None:
            return None
        products = self.flops / rates.flops + self.doubles / rates.doubles
        return products + self.disk / rates.write + self.read / rates.read


@dataclass(frozen=True)
class Plan:
    """The stages of a run on this machine, and how its memory is shared out."""

    stages: tuple[Stage, ...]
    limit: int  # bytes of memory that may be taken
    free_disk: int | None  # bytes where the run works, those of an unfinished one too; None: there is no output
    shares: Shares
    resident: int  # bytes of embeddings and norms, which are always there when blocks are paged
    block: int  # bytes of the largest block
    device: torch.device
    dtype: torch.dtype  # of the computation
    place: Path | None  # where the run works, as far as it exists
    measured: str = ""  # the metric that is measured, on whole models

    @property
    def paged(self) -> bool:
        """Whether blocks of the dense model are read when they are needed."""
        return self.shares.blocks is not None

    @property
    def least(self) -> int:
        """Bytes of memory that the hungriest stage cannot do without."""
        return max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """All that is written: nothing is removed before the end."""
        return sum(stage.disk for stage in self.stages)

    @property
    def members(self) -> list[str]:
        """Of a family, those that have stages to themselves."""
        return list(dict.fromkeys(stage.member for stage in self.stages if stage.member))

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            WrongInput: what is too large, what there is, and what would fit.
        """
        worst = max(self.stages, key=lambda stage: stage.memory)
        if worst.memory > self.limit:
            how = "block by block " if self.paged else ""
            less = "shorter windows, or an allocator with fewer rungs"
            if self.measured:
                less = f"or another metric: {self.measured} is timed on whole models, never block by block"
            raise WrongInput(
                f"{worst.name} takes at least {amount(worst.memory)} of memory {how}beside the process itself, and "
                f"{amount(max(0, self.limit))} are there; give more, {less}"
            )
        if self.free_disk is not None and self.disk > self.free_disk:
            largest = max(self.stages, key=lambda stage: stage.disk)
            less = "fewer search tokens" if largest.name == HEARING else "an allocator with fewer rungs"
            raise WrongInput(
                f"this run writes {amount(self.disk)}, {largest.name} alone {amount(largest.disk)}, and the disk has "
                f"{amount(self.free_disk)} free; make room, choose another --output, or {less}"
            )

    def as_dict(self, rates: Rates) -> dict[str, Any]:
        """For programs: bytes and seconds; None where nobody knows."""
        rows: list[dict[str, Any]] = [asdict(stage) | {"seconds": stage.seconds(rates)} for stage in self.stages]
        known = [row["seconds"] for row in rows if row["seconds"] is not None]
        of = {name: [row for row in rows if row["member"] == name] for name in self.members}
        return {
            "stages": rows,
            "memory": max(stage.memory + stage.shared for stage in self.stages),
            "disk": self.disk,
            "members": [
                {
                    "sparsity": float(name),
                    "disk": sum(row["disk"] for row in own),
                    "seconds_known": sum(row["seconds"] or 0.0 for row in own),
                }
                for name, own in of.items()
            ],
            "seconds_known": sum(known),
            "seconds_complete": len(known) == len(rows) and not any(stage.unknown for stage in self.stages),
            "paged": self.paged,
            "memory_limit": self.limit,
            "disk_free": self.free_disk,
            "resident": self.resident,
            "block": self.block,
            "shares": asdict(self.shares),
            "rates": asdict(rates),
        }


# -- counting -----------------------------------------------------------------------------------------


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
        """Of the linear maps of all blocks."""
        return sum(m.weight.numel() for b in self.blocks for m in b.modules() if isinstance(m, nn.Linear))

    def d_out(self, site: Site) -> int:
        return self.adapter.linear(self.blocks[site.block], site).out_features

    def fed(self, site: Site) -> list[int]:
        block = self.blocks[site.block]
        return [block.get_submodule(cut.path).in_features for cut in self.adapter.cuts(block, site)[:-1]]  # type: ignore[misc]

    @cached_property
    def attended(self) -> int:
        """Query heads times head width, over all blocks."""
        if not isinstance(self.adapter, Transformer):
            return 0
        blocks = (block for block in self.blocks if "attention" not in self.adapter.dropped(block))
        return sum(query * width for query, _, width in map(self.adapter.heads, blocks))

    def forward(self, tokens: int, seqlen: int, *, head: bool, share: float = 1.0) -> int:
        """FLOPs; `share`: what is kept of the blocks."""
        inside = forward_flops(tokens, self.weights, self.attended, seqlen)
        return round(share * inside) + (2 * tokens * self.width * self.vocabulary if head else 0)


def walks(allocator: Allocator, whole: Space) -> list[Space]:
    """The spaces of a search whose answers stay in the middle, and the one that is built in the end."""
    spaces = [allocator.first_space(whole)]
    while len(spaces) < 32:
        centre = spaces[-1].nearest(whole.uniform())
        if (finer := allocator.next_space(spaces[-1], centre)) is None:
            break
        spaces.append(finer)
    return [*spaces, allocator.last_space(whole, spaces[-1].nearest(whole.uniform()))]


class _Mute(Journal):
    """What asks the outside world is not rehearsed."""

    def once(self, question: Mapping[str, Any], answer: Any) -> Any:
        raise NotImplementedError("nobody is asked before the run")


def rehearsed(
    allocator: Allocator,
    space: Space,
    tokens: int,
    seqlen: int,
    limit: int | None = None,
    known: Known | None = None,
    patience: float = PATIENCE,
) -> int | None:
    """Token-forwards of a search, counted by holding it on a stand-in table; None: it would not be rehearsed.

    Losses are additive in errors that fall with the square of what is removed. A search that goes on until it is
    content may ask more or less of a real model. What is `known` from another's is free; what is learnt is added.
    """
    errors = tuple(
        tuple((1 + i % 3) * (1 - kept / site.n_groups) ** 2 for kept in ladder)
        for i, (site, ladder) in enumerate(zip(space.sites, space.ladders, strict=True))
    )
    scores = tuple(tuple(float((7 * g) % 11) for g in range(site.n_groups)) for site in space.sites)
    signals = tuple(tuple(1.0 + (i % 5) / 10 for i in range(len(space.sites))) for _ in allocator.signals)
    start, judged, paid = space.nearest(space.uniform()), {} if known is None else known, 0
    problem = Problem(space, errors, start, 0, tokens, signals, scores, _Mute())

    def loss(query: Query) -> float:
        return sum(
            (1 + i % 3) * (1 - kept / site.n_groups) ** 2
            for i, (site, kept) in enumerate(zip(space.sites, query.allocation, strict=True))
        )

    ends = time.monotonic() + patience
    try:
        search = allocator.search(problem)
        queries = next(search)
        while True:
            asked = [
                (q.allocation, tokens if q.tokens is None else min(tokens, max(1, q.tokens // seqlen) * seqlen))
                for q in queries
            ]
            paid += sum(count for key, count in dict.fromkeys((k, k[1]) for k in asked) if key not in judged)
            if limit is not None and paid > limit:
                return limit
            judged |= {key: loss(query) for key, query in zip(asked, queries, strict=True)}
            if time.monotonic() > ends:
                return None
            queries = search.send([judged[key] for key in asked])
    except StopIteration:
        return paid
    except Exception:
        return None


def planned(
    recipe: Recipe,
    model: nn.Module,
    adapter: ModelAdapter,
    wholes: Sequence[Space],
    output: Path | None,
    asked: Sequence[float] | None = None,
    *,
    rehearse: bool = False,
) -> Plan:
    """What `recipe`, checked, will take for a model of which the skeleton is enough.

    `wholes`: the space of the recipe, or of every member of its family; `asked`: the sparsities of those that results
    are made of, None: of the recipe's. Only where it is asked for, searches are rehearsed to say how long they take.

    Raises:
        WrongInput: the recipe's memory is no amount, or its metric cannot be measured on this model.
    """
    device = resolved_devices(recipe.device)[0]
    stored = next(model.parameters()).dtype
    narrow = stored.itemsize < FLOAT and device.type != "cuda"
    computed = DTYPES[recipe.dtype] if recipe.dtype != "auto" else torch.float32 if narrow else stored
    longest = int(getattr(model.config, "max_position_embeddings", LONGEST_WINDOW))  # type: ignore[union-attr]
    seqlen = recipe.data.seqlen or min(LONGEST_WINDOW, longest)
    given = {part: getattr(recipe.data, f"{part}_tokens") or most for part, most in DEFAULTS.items()}
    tokens = {part: max(1, count // seqlen) * seqlen for part, count in given.items()}
    limit_asked = parsed(recipe.memory)
    limit = round(available(device) * SPARE) if limit_asked is None else limit_asked - _taken(device)
    free_disk = place = None
    if output is not None:
        place = next(p for p in (output.resolve(), *output.resolve().parents) if p.is_dir())
        free_disk = shutil.disk_usage(place).free + written(output)  # which is gone on with, or discarded
    allocator, known = ALLOCATORS.build(recipe.allocator), dict[int, Known]()
    free = not OBJECTIVES.build(recipe.objective).reads(1).tokens

    def forwards(number: int, space: Space) -> int | None:
        if free or not rehearse:
            return 0 if free else None
        learnt = known.setdefault(number, {})
        return rehearsed(allocator, space, tokens["search"], seqlen, recipe.search_budget, learnt)

    members = []
    for each, whole in zip(recipe.members, wholes, strict=True):
        *spaces, last = walks(allocator, whole)
        counted = [forwards(number, space) for number, space in enumerate(spaces)]
        wanted = each.sparsity in (asked or [recipe.sparsity])
        members.append(Member(str(each.sparsity) if recipe.family else "", whole, spaces, counted, last, wanted))
    metric, measured = METRICS.build(recipe.metric_spec), ""
    shape, before, after = Shape(model, adapter, wholes[0].sites, stored, computed), None, None
    if isinstance(metric, MeasuredMetric):
        whole_model: Any = model
        measured, after = metric.unit, metric.runs_after(whole_model)
        before = metric.runs_before(whole_model, shape.sites) if metric.prices is None else None
    count = Count(recipe, shape, tokens, seqlen, members, before, after)

    def of(shares: Shares) -> Plan:
        stages = tuple(count.stages(shares))
        return Plan(stages, limit, free_disk, shares, count.resident, count.block, device, computed, place, measured)

    plan, tight = of(Shares()), of(Shares(blocks=0))
    can = next(model.parameters()).is_meta and tight.least < plan.least  # else it is in memory already, or very small
    if paged := can and not measured and plan.least > limit:
        plan = tight
    room_to_solve = 3 * DOUBLE * max(site.d_in for site in shape.sites) ** 2  # for pruners that factorise
    return of(Shares.of(limit - plan.least - room_to_solve, paged=paged))


@dataclass(frozen=True, eq=False)
class Member:
    """A run under one budget, in numbers."""

    name: str  # its sparsity; "" alone
    whole: Space
    spaces: Sequence[Space]  # of every round
    forwards: Sequence[int | None]  # token-forwards of every search
    last: Space  # what is built in the end
    wanted: bool  # there is to be a result

    @cached_property
    def freed(self) -> int:
        """Parameters that a uniform allocation removes; zeros are none."""
        sites, plan = self.whole.sites, self.whole.uniform()
        groups = [(site, kept) for site, kept in zip(sites, plan, strict=True) if site.kind != "linear"]
        return sum(site.parameters(site.n_groups) - site.parameters(kept) for site, kept in groups)

    def called(self, stage: str) -> str:
        """A stage that every member has."""
        return f"{stage} for {self.name}" if self.name else stage


@dataclass(frozen=True, eq=False)
class Count:
    """A recipe in numbers."""

    recipe: Recipe
    shape: Shape
    tokens: Mapping[str, int]  # by part
    seqlen: int
    members: Sequence[Member]
    before: Runs | None = None  # in which a metric is measured before the search
    after: Runs | None = None  # and on every result

    @cached_property
    def everything(self) -> int:
        """Bytes of the dense model in the dtype of the computation."""
        return self.shape.parameters(self.shape.model) * self.shape.computed.itemsize

    @cached_property
    def block(self) -> int:
        """Bytes of the largest block."""
        return max(self._blocks)

    @cached_property
    def resident(self) -> int:
        """Bytes of what is neither in blocks nor the head."""
        return self.everything - sum(self._blocks) - self._head

    @cached_property
    def _blocks(self) -> list[int]:
        return [self.shape.parameters(block) * self.shape.computed.itemsize for block in self.shape.blocks]

    @cached_property
    def _head(self) -> int:
        model: Any = self.shape.model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        return 0 if head.weight is embedding.weight else self.shape.parameters(head) * self.shape.computed.itemsize

    @cached_property
    def needs(self) -> frozenset[str]:
        """Statistics that plug-ins ask for."""
        signals = signals_of(ALLOCATORS.build(self.recipe.allocator))
        return PRUNERS.build(self.recipe.pruner).needs.union(*(signal.needs for signal in signals))

    def stages(self, shares: Shares) -> Iterator[Stage]:
        """Every stage, in order, when memory is shared out so; what the dense model has said stays to the end."""
        heard = 0
        for stage in self._stages(shares):
            if stage.name == HEARING:
                heard, _ = self._heard(shares)
            yield replace(stage, shared=stage.shared + heard)

    def _stages(self, shares: Shares) -> Iterator[Stage]:
        paged, size = shares.blocks is not None, self.shape.computed.itemsize
        held = self.resident + self._page if paged else self.everything
        chunk = min(max(TOKENS_AT_ONCE, self.seqlen), max(self.tokens.values()))
        widest = max(site.d_in for site in self.shape.sites)
        working = chunk * size * (3 * widest + 6 * self.shape.width) + CUSHION
        yield Stage("open", held + CUSHION, shares.blocks or 0, read=self._stored)
        if self.before is not None:
            yield Stage(
                "time sub-layers", self.everything + self.before.copied * size + CUSHION,
                flops=self._runs(self.before), unknown=self.before.unknown,
            )  # fmt: skip
        if "gradient" in self.needs:
            yield self._gradients(shares, held + working)
        yield from self._rounds(shares, held + working)
        for number, member in enumerate(each for each in self.members if each.wanted):
            yield from self._result(member, shares, held, working, first=number == 0)

    def _runs(self, runs: Runs) -> int:
        """FLOPs."""
        return runs.count * self.shape.forward(runs.tokens, runs.seqlen, head=False)

    def _gradients(self, shares: Shares, held: int) -> Stage:
        shape, tokens = self.shape, self.tokens["calibration"]
        streams = tokens * shape.width * shape.computed.itemsize * (len(shape.blocks) + 2)
        inside, spilled = _spilled(streams, shares)
        learnt = 2 * FLOAT * shape.weights
        return Stage(
            "gradients", held + learnt // len(shape.blocks), (shares.blocks or 0) + inside, learnt + spilled,
            read=0 if shares.blocks is None else 2 * self._stored_blocks,
            flops=3 * shape.forward(tokens, self.seqlen, head=True),
        )  # fmt: skip

    def _rounds(self, shares: Shares, held: int) -> Iterator[Stage]:
        """A walk along the rungs of all, then the search of each."""
        recipe, shape, (heard, written) = self.recipe, self.shape, self._heard(shares)
        for number, every in enumerate(self._walked):
            yield self._walk(f"prune {number + 1}", every, shares, held)
            if number == 0 and heard + written:
                yield Stage(
                    HEARING, held, shares.blocks or 0, written, read=0 if shares.blocks is None else self._stored,
                    flops=shape.forward(self.tokens["search"], self.seqlen, head=True),
                )  # fmt: skip
            for member in self.members:
                if number >= len(member.spaces):
                    continue
                forwards, share = member.forwards[number], self._share(member)
                flops = None if forwards is None else shape.forward(forwards, self.seqlen, head=True, share=share)
                most = "" if recipe.search_budget is None else f"at most {recipe.search_budget:,} token-forwards"
                why = most if forwards != 0 else ""
                if forwards is None:
                    why = most or "what the allocator will ask"
                ready = shares.hidden + shares.dense + shares.parts if forwards != 0 else 0
                yield Stage(
                    member.called(f"search {number + 1}"), held, (shares.blocks or 0) + ready,
                    flops=flops, unknown=why, member=member.name,
                )  # fmt: skip

    def _result(self, member: Member, shares: Shares, held: int, working: int, *, first: bool) -> Iterator[Stage]:
        """Rebuilt, finished, measured, saved; the first measures the dense model too."""
        recipe, shape, judged = self.recipe, self.shape, self.tokens["evaluation"]
        paged, size, kept = shares.blocks is not None, shape.computed.itemsize, shares.blocks or 0
        if recipe.rebuild and member.last.ladders != self._walked[len(member.spaces) - 1].ladders:
            yield self._walk(member.called("rebuild"), member.last, shares, held + working, member.name)
        stays = self.everything // size - member.freed  # parameters
        logits = 2 * FLOAT * min(judged, max(self.seqlen, LOGITS_AT_ONCE // shape.vocabulary)) * shape.vocabulary
        hidden = min(HIDDEN_BYTES, judged * shape.width * size)
        both = held + self._page + hidden if paged else self.everything + stays * size
        if recipe.finishers:
            own = stays * max(size, FLOAT)
            both = max(both, held + own)
            inside, spilled = _spilled(4 * self.tokens["calibration"] * shape.width * size, shares)
            names = ", ".join(spec["name"] for spec in recipe.finishers)
            yield Stage(
                member.called("finish"), held + own + working, kept + inside, spilled,
                flops=None, unknown=names, member=member.name,
            )  # fmt: skip
        models = 1 + first
        small = shape.forward(judged, self.seqlen, head=True, share=self._share(member))
        yield Stage(
            member.called("evaluate"), both + logits + CUSHION, kept, read=models * self._stored if paged else 0,
            flops=small + first * shape.forward(judged, self.seqlen, head=True), member=member.name,
        )  # fmt: skip
        if self.after is not None:
            yield Stage(
                member.called("time the result"), both + CUSHION,
                flops=self._runs(self.after), unknown=self.after.unknown, member=member.name,
            )  # fmt: skip
        largest = max(p.numel() for p in shape.model.parameters()) * (size + shape.stored.itemsize)
        units = Structure.parsed(recipe.structure).units
        order = Order(shape.adapter, units, recipe.code, stays, shape.stored.itemsize)
        streamed = paged and not recipe.finishers
        saved = sum(EXPORTERS.build(spec).size(order) for spec in recipe.exporters)
        exported = held + self._page + largest if streamed else both
        read = (2 * self._stored if streamed else 0) + (saved if recipe.verify else 0)  # for the probe, and to write
        yield Stage(member.called("export"), exported + CUSHION, kept, saved, read, member=member.name)

    @cached_property
    def _walked(self) -> list[Space]:
        """Of every round, the rungs of all that still search."""
        rounds = []
        for number in range(max(len(member.spaces) for member in self.members)):
            first, *others = [m.spaces[number] for m in self.members if number < len(m.spaces)]
            rounds.append(first.joined(*others))
        return rounds

    @property
    def _page(self) -> int:
        """Bytes of the largest part of the model that is read at once."""
        return max(self.block, self._head)

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
        top = OBJECTIVES.build(self.recipe.objective).reads(len(self.shape.blocks)).top
        said = top_bytes(self.tokens["search"], top, self.shape.vocabulary)
        inside = min(said, shares.teacher)
        return inside, min(said - inside, shares.teacher_disk)

    def _walk(self, name: str, space: Space, shares: Shares, held: int, member: str = "") -> Stage:
        """`held`: bytes in memory beside what a site takes."""
        shape, needs, tokens = self.shape, self.needs, self.tokens["calibration"]
        scores = not name.startswith("rebuild") and "scores" in ALLOCATORS.build(self.recipe.allocator).needs
        size, streams = shape.computed.itemsize, 1 + bool({"cross", "drift"} & needs)
        memory = disk = spill = doubles = 0
        flops = streams * shape.forward(tokens, self.seqlen, head=False)
        for _, members in groupby(space.sites, key=lambda site: site.block):
            block = [(s.d_in, shape.adapter.part(s) is not None, bool(s.shares)) for s in members]
            spill = max(spill, activations_bytes(tokens, shape.width, size, block, streams))
        for site, ladder in zip(space.sites, space.ladders, strict=True):
            d_out, part = shape.d_out(site), shape.adapter.part(site) is not None
            fed, paired = shape.fed(site) if "power" in needs else (), by_pairs(site, d_out)
            moments = moments_bytes(site.d_in, d_out, needs, part=part, paired=paired, fed=fed)
            # the weight of every rung as proposed and as rounded, or rounded and twice to be written; mean in float64
            each = max(size + shape.stored.itemsize, 3 * shape.stored.itemsize)
            weights = site.d_in * d_out * (len(ladder) * each + 2 * DOUBLE + 2 * size)
            # sums and what is added to them, or their means where they are shared; then means alone
            made = (site.d_in if paired else d_out) if streams == 2 else 0
            beside = moments if site.shares else FLOAT * site.d_in * max(next(strips(site.d_in)).stop, made)
            memory = max(memory, moments + beside, moments + weights)
            disk += store_bytes(site, d_out, ladder, shape.stored, scores=scores)
            flops += moments_flops(tokens, site.d_in, d_out, needs, part=part, paired=paired)
            cross = "cross" in needs and site.kind != "linear"
            widths = [count * site.group_size if cross else site.d_in for count in ladder]
            doubles += judging_flops(site.d_in, d_out, widths, cross=cross)
        inside, spilled = _spilled(spill, shares)
        read = 0 if shares.blocks is None else self._stored_blocks
        unknown = f"the work of {self.recipe.pruner['name']} itself"
        return Stage(
            name, held + memory, (shares.blocks or 0) + inside, disk + spilled, read, flops, doubles, unknown, member
        )  # fmt: skip


def _rate(a: torch.Tensor) -> float:
    """FLOP/s of products of a square matrix with itself, over half a second."""
    out = torch.mm(a, a)  # the first time pays for what later ones find ready
    _finished(a)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < 0.5:
        torch.mm(a, a, out=out)
        done += 2 * len(a) ** 3
        _finished(a)
    return done / (time.perf_counter() - begun)


def _finished(a: torch.Tensor) -> None:
    """Its device may still be busy."""
    if a.is_cuda:
        torch.cuda.synchronize(a.device)


def _spilled(activations: int, shares: Shares) -> tuple[int, int]:
    """(bytes in memory, bytes on disk)."""
    inside = activations if shares.activations is None else min(activations, shares.activations)
    return inside, activations - inside


def _taken(device: torch.device) -> int:
    """Bytes this process has already, on a machine that says so."""
    statm = Path("/proc/self/statm")
    if device.type == "cuda" or not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
