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
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.adapters import ModelAdapter
from prunekit.calibration.draws import LONGEST_WINDOW
from prunekit.calibration.flow import TOKENS_AT_ONCE
from prunekit.calibration.windows import DEFAULTS
from prunekit.checkpoint import DTYPES, resolved_device
from prunekit.contracts import Allocator, Journal, Problem, Query
from prunekit.errors import WrongInput
from prunekit.evaluate import HIDDEN_BYTES, LOGITS_AT_ONCE
from prunekit.memory import Shares, amount, available, parsed
from prunekit.recipe import Recipe
from prunekit.registry import ALLOCATORS, OBJECTIVES, PRUNERS, signals_of
from prunekit.shards import file_bytes
from prunekit.sites import Allocation, Site, Space

FLOAT, DOUBLE = 4, 8  # bytes
SPARE = 0.9  # of what is free on the machine; the rest is for others
PATIENCE = 2.0  # seconds that a search is rehearsed
CUSHION = 64 << 20  # bytes: what libraries hold, and tensors that come and go

# -- formulas -----------------------------------------------------------------------------------------


def moments_bytes(
    d_in: int, d_out: int, needs: Iterable[str] = (), *, part: bool = True, fed: Sequence[int] = ()
) -> int:
    """Of `Moments` of one site in float64: means, second moments, and what `needs` adds.

    `part`: its output is that of a sub-layer. `fed`: widths of the inputs of its feeders.
    """
    needs, values = set(needs), d_in + d_in**2
    if {"cross", "drift"} & needs:
        values += d_in**2 + (d_out * d_in if part else 0)
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


def activations_bytes(tokens: int, d: int, itemsize: int, block: Sequence[tuple[int, bool]], streams: int) -> int:
    """The most a `BlockFlow` keeps at once within one block.

    `block`: of every site (d_in, whether its output is that of a sub-layer). Hidden states are there all the time,
    outputs of sub-layers until the block is done, inputs of a site until its outputs are, one stream after the other.
    """
    most = before = 0
    for d_in, part in block:
        own = d if part else 0
        most = max(most, *(streams * before + j * own + (streams - j + 1) * d_in for j in (1, streams)))
        before += own
    return tokens * itemsize * (streams * d + most)


def forward_flops(tokens: int, weights: int, attended: int, seqlen: int) -> int:
    """Of one forward pass: two for every weight of a linear map and token, and scores and values of attention.

    `attended`: query heads times head width, summed over blocks; kernels compute the whole square of a window.
    """
    return tokens * (2 * weights + 4 * seqlen * attended)


def moments_flops(tokens: int, d_in: int, d_out: int, needs: Iterable[str] = (), *, part: bool = True) -> int:
    """Of adding up the moments of one site."""
    crossed = bool({"cross", "drift"} & set(needs))
    return 2 * tokens * (d_in**2 * (2 if crossed else 1) + (d_in * d_out * (2 if part else 1) if crossed else 0))


def judging_flops(d_in: int, d_out: int, rungs: int) -> int:
    """Of the relative errors of all candidates of one site, and the energy they are relative to."""
    return 2 * d_out * d_in**2 * (rungs + 1)


# -- what there is ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Measured on this machine in a second or two."""

    flops: float  # of matrix products in the dtype of the computation, per second
    read: float  # bytes per second from the disk that holds the output
    write: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, folder: Path) -> Rates:
        """A square product, and a file written, dropped from the cache and read again."""
        a = torch.randn(1024, 1024, device=device).to(dtype)
        out = a @ a  # the first time pays for what later ones find ready
        done, begun = 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < 0.5:
            out = a @ a
            done += 2 * 1024**3
        float(out[0, 0])  # a device may still be busy
        flops = done / (time.perf_counter() - begun if device.type == "cuda" else spent)
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
        return cls(flops, read, write)


@dataclass(frozen=True)
class Stage:
    """What one part of a run takes. Memory is beside what the process itself holds."""

    name: str
    memory: int  # bytes that it cannot do without
    shared: int = 0  # bytes it makes use of beyond, of what bounds allow
    disk: int = 0  # bytes that are written
    read: int = 0  # bytes that are read
    flops: int | None = 0  # None: nobody knows
    unknown: str = ""  # what else takes time

    def seconds(self, rates: Rates) -> float | None:
        """How long that takes; None: nobody knows."""
        if self.flops is None:
            return None
        return self.flops / rates.flops + self.disk / rates.write + self.read / rates.read


@dataclass(frozen=True)
class Plan:
    """The stages of a run on this machine, and how its memory is shared out."""

    stages: tuple[Stage, ...]
    limit: int  # bytes of memory that may be taken
    free_disk: int | None  # bytes where the run works; None: there is no output
    shares: Shares
    resident: int  # bytes of embeddings and norms, which are always there when blocks are paged
    block: int  # bytes of the largest block
    device: torch.device
    dtype: torch.dtype  # of the computation
    place: Path | None  # where the run works, as far as it exists

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

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            WrongInput: what is too large, what there is, and what would fit.
        """
        worst = max(self.stages, key=lambda stage: stage.memory)
        if worst.memory > self.limit:
            how = "block by block " if self.paged else ""
            raise WrongInput(
                f"{worst.name} takes at least {amount(worst.memory)} of memory {how}beside the process itself, and "
                f"{amount(max(0, self.limit))} are there; give more, shorter windows, or an allocator with fewer rungs"
            )
        if self.free_disk is not None and self.disk > self.free_disk:
            largest = max(self.stages, key=lambda stage: stage.disk)
            raise WrongInput(
                f"this run writes {amount(self.disk)}, {largest.name} alone {amount(largest.disk)}, and the disk has "
                f"{amount(self.free_disk)} free; make room, choose another --output, or an allocator with fewer rungs"
            )

    def as_dict(self, rates: Rates) -> dict[str, Any]:
        """For programs: bytes and seconds; None where nobody knows."""
        rows = [asdict(stage) | {"seconds": stage.seconds(rates)} for stage in self.stages]
        known = [row["seconds"] for row in rows if row["seconds"] is not None]
        return {
            "stages": rows,
            "memory": max(stage.memory + stage.shared for stage in self.stages),
            "disk": self.disk,
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
    whole: Space
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
        if not hasattr(self.adapter, "heads"):  # a family without attention
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


def rehearsed(allocator: Allocator, space: Space, tokens: int, seqlen: int, limit: int | None = None) -> int | None:
    """Token-forwards of a search, counted by holding it on a stand-in table; None: it would not be rehearsed.

    Losses are additive in errors that fall with the square of what is removed. A search that goes on until it is
    content may ask more or less of a real model.
    """
    errors = tuple(
        tuple((1 + i % 3) * (1 - kept / site.n_groups) ** 2 for kept in ladder)
        for i, (site, ladder) in enumerate(zip(space.sites, space.ladders, strict=True))
    )
    scores = tuple(tuple(float((7 * g) % 11) for g in range(site.n_groups)) for site in space.sites)
    signals = tuple(tuple(1.0 + (i % 5) / 10 for i in range(len(space.sites))) for _ in allocator.signals)
    start, judged, paid = space.nearest(space.uniform()), dict[tuple[Allocation, int], float](), 0
    problem = Problem(space, errors, start, 0, tokens, signals, scores, _Mute())

    def loss(query: Query) -> float:
        return sum(
            (1 + i % 3) * (1 - kept / site.n_groups) ** 2
            for i, (site, kept) in enumerate(zip(space.sites, query.allocation, strict=True))
        )

    ends = time.monotonic() + PATIENCE
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
    whole: Space,
    output: Path | None,
    *,
    rehearse: bool = False,
) -> Plan:
    """What `recipe`, checked, will take for a model of which the skeleton is enough.

    Only where it is asked for, searches are rehearsed to say how long they take.

    Raises:
        WrongInput: the recipe's memory is no amount.
    """
    device = resolved_device(recipe.device)
    stored = next(model.parameters()).dtype
    narrow = stored.itemsize < FLOAT and device.type != "cuda"
    computed = DTYPES[recipe.dtype] if recipe.dtype != "auto" else torch.float32 if narrow else stored
    longest = int(getattr(model.config, "max_position_embeddings", LONGEST_WINDOW))  # type: ignore[union-attr]
    seqlen = recipe.data.seqlen or min(LONGEST_WINDOW, longest)
    given = {part: getattr(recipe.data, f"{part}_tokens") or most for part, most in DEFAULTS.items()}
    tokens = {part: max(1, count // seqlen) * seqlen for part, count in given.items()}
    asked = parsed(recipe.memory)
    limit = round(available(device) * SPARE) if asked is None else asked - _taken(device)
    free_disk = place = None
    if output is not None:
        place = next(p for p in (output.resolve(), *output.resolve().parents) if p.exists())
        free_disk = shutil.disk_usage(place).free
    allocator = ALLOCATORS.build(recipe.allocator)
    spaces = walks(allocator, whole)
    forwards: list[int | None] = [None] * (len(spaces) - 1)
    if not OBJECTIVES.build(recipe.objective).reads_tokens:
        forwards = [0] * (len(spaces) - 1)
    elif rehearse:
        forwards = [rehearsed(allocator, s, tokens["search"], seqlen, recipe.search_budget) for s in spaces[:-1]]
    count = Count(recipe, Shape(model, adapter, whole, stored, computed), tokens, seqlen, spaces, forwards)

    def of(shares: Shares) -> Plan:
        return Plan(
            tuple(count.stages(shares)), limit, free_disk, shares, count.resident, count.block, device, computed, place
        )

    plan, tight = of(Shares()), of(Shares(blocks=0))
    can = next(model.parameters()).is_meta and tight.least < plan.least  # else it is in memory already, or very small
    if paged := can and plan.least > limit:
        plan = tight
    room_to_solve = 3 * DOUBLE * max(site.d_in for site in whole.sites) ** 2  # for pruners that factorise
    return of(Shares.of(limit - plan.least - room_to_solve, paged=paged))


@dataclass(frozen=True, eq=False)
class Count:
    """A run in numbers."""

    recipe: Recipe
    shape: Shape
    tokens: Mapping[str, int]  # by part
    seqlen: int
    spaces: Sequence[Space]  # of every walk; the last is what is built in the end
    forwards: Sequence[int | None]  # token-forwards of every search

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
        """Every stage, in order, when memory is shared out so."""
        recipe, shape, tokens, seqlen = self.recipe, self.shape, self.tokens, self.seqlen
        paged, size = shares.blocks is not None, shape.computed.itemsize
        page = max(self.block, self._head)
        held = self.resident + page if paged else self.everything
        kept = shares.blocks or 0  # of blocks beside the one that is needed
        checkpoint = self.everything // size * shape.stored.itemsize
        blocks = sum(self._blocks) // size * shape.stored.itemsize
        share = float(1 - recipe.sparsity)
        small = round(checkpoint - blocks * (1 - share))
        chunk = min(max(TOKENS_AT_ONCE, seqlen), max(tokens.values()))
        working = chunk * size * (3 * max(s.d_in for s in shape.whole.sites) + 6 * shape.width) + CUSHION
        yield Stage("open", held + CUSHION, kept, read=checkpoint)
        if "gradient" in self.needs:
            streams = tokens["calibration"] * shape.width * size * (len(shape.blocks) + 2)
            inside, spilled = _spilled(streams, shares)
            learnt = 2 * FLOAT * shape.weights
            yield Stage(
                "gradients", held + working + learnt // len(shape.blocks), kept + inside, learnt + spilled,
                read=2 * blocks if paged else 0, flops=3 * shape.forward(tokens["calibration"], seqlen, head=True),
            )  # fmt: skip
        for number, (space, forwards) in enumerate(zip(self.spaces[:-1], self.forwards, strict=True), 1):
            yield self._walk(f"prune {number}", space, shares, held + working, blocks if paged else 0)
            flops = None if forwards is None else shape.forward(forwards, seqlen, head=True, share=share)
            most = "" if recipe.search_budget is None else f"at most {recipe.search_budget:,} token-forwards"
            why = most if forwards != 0 else ""
            if forwards is None:
                why = most or "what the allocator will ask"
            bounds = kept + shares.hidden + shares.dense + shares.parts if forwards != 0 else 0
            yield Stage(f"search {number}", held + working, bounds, flops=flops, unknown=why)
        if recipe.rebuild and self.spaces[-1].ladders != self.spaces[-2].ladders:
            yield self._walk("rebuild", self.spaces[-1], shares, held + working, blocks if paged else 0)
        judged = tokens["evaluation"]
        logits = 2 * FLOAT * min(judged, max(seqlen, LOGITS_AT_ONCE // shape.vocabulary)) * shape.vocabulary
        hidden = min(HIDDEN_BYTES, judged * shape.width * size)
        both = held + page + hidden if paged else self.everything + round(self.everything * small / checkpoint)
        if recipe.finishers:
            own = self.everything // size * max(size, FLOAT) * small // checkpoint
            both = max(both, held + own)
            inside, spilled = _spilled(4 * tokens["calibration"] * shape.width * size, shares)
            names = ", ".join(spec["name"] for spec in recipe.finishers)
            yield Stage("finish", held + own + working, kept + inside, spilled, flops=None, unknown=names)
        yield Stage(
            "evaluate", both + logits + CUSHION, kept, read=2 * checkpoint if paged else 0,
            flops=2 * shape.forward(judged, seqlen, head=True),
        )  # fmt: skip
        largest = max(p.numel() for p in shape.model.parameters()) * (size + shape.stored.itemsize)
        exported = held + page + largest if paged and not recipe.finishers else both
        read = checkpoint + small if recipe.verify else checkpoint
        yield Stage("export", exported + CUSHION, kept, small, read)

    def _walk(self, name: str, space: Space, shares: Shares, held: int, read: int) -> Stage:
        """`held`: bytes in memory beside what a site takes; `read`: bytes of blocks, where they are paged."""
        shape, needs, tokens = self.shape, self.needs, self.tokens["calibration"]
        scores = name != "rebuild" and "scores" in ALLOCATORS.build(self.recipe.allocator).needs
        size, streams = shape.computed.itemsize, 1 + bool({"cross", "drift"} & needs)
        memory = disk = spill = 0
        flops = streams * shape.forward(tokens, self.seqlen, head=False)
        for _, members in groupby(space.sites, key=lambda site: site.block):
            block = [(s.d_in, shape.adapter.part(s) is not None) for s in members]
            spill = max(spill, activations_bytes(tokens, shape.width, size, block, streams))
        for site, ladder in zip(space.sites, space.ladders, strict=True):
            d_out, part = shape.d_out(site), shape.adapter.part(site) is not None
            fed = shape.fed(site) if "power" in needs else ()
            moments = moments_bytes(site.d_in, d_out, needs, part=part, fed=fed)
            # the weight of every rung as proposed and as rounded, or rounded and twice to be written; mean in float64
            each = max(size + shape.stored.itemsize, 3 * shape.stored.itemsize)
            weights = site.d_in * d_out * (len(ladder) * each + 2 * DOUBLE + 2 * size)
            memory = max(memory, 2 * moments, moments + weights)  # sums and means, then means alone
            disk += store_bytes(site, d_out, ladder, shape.stored, scores=scores)
            flops += moments_flops(tokens, site.d_in, d_out, needs, part=part)
            flops += 2 * judging_flops(site.d_in, d_out, len(ladder))  # float64 takes twice as long
        inside, spilled = _spilled(spill, shares)
        unknown = f"the work of {self.recipe.pruner['name']} itself"
        return Stage(name, held + memory, (shares.blocks or 0) + inside, disk + spilled, read, flops, unknown)


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
