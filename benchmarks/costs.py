"""What a run costs on paper: bytes, products and seconds of every stage, on machines that are not at hand.

    python benchmarks/costs.py                                    # Llama-3.1-8B and 70B on one H200 and on eight
    python benchmarks/costs.py --check MODEL --dataset calibration.txt

The paper counts from shapes, as `prunekit plan` does, and knows beside that what `obs` itself takes:

    4 d_in³ + 6 d_in² d_out   in float64: inverse, removal, factor, weights                 (1)
    4/3 d_in³ + d_in² d_out   of single weights: factor, inverse, its factor, compensation  (2)

and one round trip to the device per launch, of which a removed group needs `LAUNCHES`. A last table has what a pass
waits for of the linear algebra of its layers, where several devices hold the model each: those that wait for each other
come one after the other, all others are dealt out. Rates are peaks times a share
that is reached. `--check` holds the same paper, with rates measured here, to a calibration pass and a search measured
here, and shows what removals take when they are launched one by one and when they are replayed, which differs on CUDA:

    python benchmarks/costs.py --check MODEL --device cuda
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import torch
import typer
from calibration_pass import calibrate, forward, now, products
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from prunekit.calibration.fill import build
from prunekit.calibration.moments import Moments
from prunekit.calibration.statistics import statistics_of
from prunekit.data.draws import draw
from prunekit.layer import replay
from prunekit.layer.problem import judging_flops
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import opened
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.registry import OBJECTIVES, PRUNERS
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.plan.count import Shape
from prunekit.run.plan.rehearsal import list_passes, rehearsed
from prunekit.run.spaces import whole_space
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.space.ladders import Space
from prunekit.system.progress import Progress
from prunekit_strategies.pruners.obs.removal import remove_columns

MODELS = {  # hidden size, neurons, blocks, query heads, KV heads
    "Llama-3.1-8B": (4096, 14_336, 32, 32, 8),
    "Llama-3.1-70B": (8192, 28_672, 80, 64, 8),
}
LAUNCHES = 20  # kernels for a group that is removed
QUESTIONS = 40  # times that a search asks, each a pass over the blocks of a model that does not fit
GB, TERA = 1e9, 1e12


Row = tuple[str, int, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Machine:
    """Rates that are reached; the defaults are 0.6 of an H200's peaks."""

    name: str = "H200"
    forward: float = 0.6 * 989 * TERA  # FLOP/s of a forward pass, in the dtype of the computation
    products: float = 0.6 * 989 * TERA  # of tokens by tokens
    doubles: float = 0.6 * 67 * TERA  # of matrix products in float64
    bandwidth: float = 0.6 * 4.8 * TERA  # bytes/s of its memory
    disk: float = 4 * GB  # bytes/s
    launch: float = 5e-6  # seconds
    memory: float = 141 * GB
    devices: int = 1


@dataclass(frozen=True)
class Line:
    """One stage."""

    name: str
    seconds: float
    flops: float = 0.0
    moved: float = 0.0  # bytes from or to disk
    held: float = 0.0  # bytes on a device
    note: str = ""


def main(
    models: Annotated[str, typer.Option(help="by comma")] = ",".join(MODELS),
    devices: Annotated[str, typer.Option(help="how many, by comma")] = "1,8",
    seqlen: int = 2048,
    tokens: Annotated[int, typer.Option(help="of calibration, and to search on")] = 131_072,
    check: Annotated[str | None, typer.Option(help="a model to measure here")] = None,
    dataset: str = "python-docs",
    device: Annotated[str, typer.Option(help="to measure on")] = "auto",
) -> None:
    """Print Markdown tables."""
    if check is not None:
        checked(check, dataset, device)
        return
    for name in models.split(","):
        shape, whole = llama(*MODELS[name], seqlen=seqlen)
        for count in map(int, devices.split(",")):
            machine = Machine(devices=count)
            print(f"\n{name}, {count} x {machine.name}, {tokens:,} tokens\n")
            print(
                "| stage | TFLOP | from or to disk, GB | held per device, GB | seconds | |\n|---|---|---|---|---|---|"
            )
            lines = list(paper(shape, whole, machine, tokens, seqlen))
            for line in [*lines, Line("all", sum(line.seconds for line in lines))]:
                numbers = f"{line.flops / TERA:,.0f} | {line.moved / GB:,.0f} | {line.held / GB:,.0f}"
                print(f"| {line.name} | {numbers} | {line.seconds:,.0f} | {line.note} |")
    for name in models.split(","):
        print(f"\nlinear algebra of the layers of {name} that a pass waits for\n")
        print(f"| | {' | '.join(f'seconds, {count} x {Machine.name}' for count in map(int, devices.split(',')))} |")
        print("|---|" + "---|" * len(devices.split(",")))
        for row, blocks, steps in layers(*MODELS[name], Machine()):
            spent = (blocks * sum(longest(step, count) for step in steps) for count in map(int, devices.split(",")))
            print(f"| {row} | {' | '.join(f'{seconds:,.1f}' for seconds in spent)} |")


def layers(width: int, neurons: int, blocks: int, heads: int, kv: int, machine: Machine) -> Iterator[Row]:
    """What is pruned and carried; how often there are such steps; the seconds of the layers of each, of which none
    waits for another."""
    narrow = width // heads * kv

    def groups(d_in: int, count: int) -> float:
        return (4 * d_in**3 + 6 * d_in**2 * width) / machine.doubles + LAUNCHES * count * machine.launch  # (1)

    def single(d_in: int, d_out: int) -> float:
        return (4 / 3 * d_in**3 + d_in**2 * d_out) / machine.doubles  # (2)

    attention, mlp = groups(width, kv), groups(neurons, neurons)
    qkv, gate = [single(width, width), *[single(width, narrow)] * 2], [single(width, neurons)] * 2
    yield "groups, carried to the next layer", blocks, [[attention], [mlp]]
    yield "groups, nothing is carried", 1, [[attention, mlp] * blocks]
    yield "single weights, carried", blocks, [qkv, [single(width, width)], gate, [single(neurons, width)]]
    yield "neurons of eight such experts, carried", blocks, [[attention], [mlp] * 8]


def longest(seconds: Sequence[float], devices: int) -> float:
    """Until the last device is done, when each takes the next layer as soon as it is free."""
    busy = [0.0] * devices
    for each in seconds:
        busy[busy.index(min(busy))] += each
    return max(busy)


def llama(width: int, neurons: int, blocks: int, heads: int, kv: int, *, seqlen: int) -> tuple[Shape, Space]:
    """A skeleton in numbers, and the space of the preset `default`."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=width, intermediate_size=neurons, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=seqlen, tie_word_embeddings=False,
    )  # fmt: skip
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shaped(model, adapter_for("llama"), torch.bfloat16)


def shaped(model: PreTrainedModel, adapter: ModelAdapter, computed: torch.dtype) -> tuple[Shape, Space]:
    stored = next(model.parameters()).dtype
    whole = whole_space(resolve(Recipe.load("search").with_overrides({"sparsity": 0.5})), model, adapter, stored)
    return Shape(model, adapter, whole.sites, stored, computed), whole


def paper(shape: Shape, whole: Space, machine: Machine, tokens: int, seqlen: int) -> Iterator[Line]:
    """The stages of the preset `default`: every round calibrates and searches, and the answer is built."""
    size, allocator = shape.computed.itemsize, resolve(Recipe.load("search")).allocator
    weights, block = shape.parameters(shape.model) * size, max(shape.parameters(b) for b in shape.blocks) * size
    fits = weights < 0.9 * machine.memory
    held, again = (weights, 0) if fits else (4 * block, weights)  # bytes read whenever all blocks are gone through
    yield Line("read the checkpoint", weights / machine.disk, moved=weights, held=held)
    *spaces, last = list_passes(allocator, whole)
    parts = [list(calibrated(shape, space, machine, tokens, seqlen, copies=fits)) for space in (*spaces, last)]
    for rounds in zip(*parts, strict=True):
        read = again * len(rounds) if rounds[0].name == "forward" else 0
        yield Line(
            f"{len(rounds)} calibration passes: {rounds[0].name}",
            sum(line.seconds for line in rounds) + read / machine.disk,
            sum(line.flops for line in rounds), sum(line.moved for line in rounds) + read,
            held + max(line.held for line in rounds), rounds[0].note,
        )  # fmt: skip
    asked = [rehearsed(allocator, space, tokens, seqlen, patience=math.inf) for space in spaces]
    forwards = sum(search.forwards or 0 for search in asked)
    flops, read = shape.forward(forwards, seqlen, head=True, share=0.5), again * QUESTIONS * len(spaces)
    yield Line(
        f"{len(spaces)} searches", flops / machine.forward / machine.devices + read / machine.disk, flops, read, held,
        f"{forwards:,} token-forwards",
    )  # fmt: skip
    yield Line("write the result", weights / 2 / machine.disk, moved=weights / 2, held=held)


def calibrated(
    shape: Shape, space: Space, machine: Machine, tokens: int, seqlen: int, *, copies: bool = True
) -> Iterator[Line]:
    """The parts of a calibration pass by the preset's `obs`, which has the dense model beside it.

    `copies`: every device has the model. A layer waits for the candidates of the one before, and what else there is to
    do with those is done meanwhile: by the other devices, and by a thread that stores.
    """
    double, statistics = torch.float64.itemsize, statistics_of(PRUNERS.build(Recipe.load("search").pruner).needs)
    passes = 2 * shape.forward(tokens, seqlen, head=False)
    hidden = 2 * tokens * shape.width * shape.computed.itemsize / machine.devices
    moments = judged = pruned = stored = most = launches = 0.0
    for site, ladder in zip(space.sites, space.ladders, strict=True):
        d_in, d_out = site.d_in, site.d_out
        own, there = shape.map(site), shape.collected(site, statistics)
        moments += Moments.flops(there, own, {}, tokens)
        judged += judging_flops(d_in, d_out, [count * site.group_size for count in ladder], cross=True)
        pruned += 4 * d_in**3 + 6 * d_in**2 * d_out  # (1)
        launches += LAUNCHES * site.n_groups * machine.launch
        stored += CandidateStore.bytes(site, ladder, shape.stored)
        most = max(most, Moments.bytes(there, own, {}) + 3 * double * d_in**2)
    seconds = passes / machine.forward / machine.devices, moments / machine.products / machine.devices
    yield Line("forward", seconds[0], passes, held=hidden)
    yield Line("moments", seconds[1], moments)
    note = f"of one calibration pass, {launches:,.0f} s are launches; on one device"
    yield Line("obs", chain := pruned / machine.doubles + launches, pruned, held=most, note=note)
    errors, store, note = judged / machine.doubles, stored / machine.disk, ""
    if machine.devices > 1 and copies:
        note, chain = "of one calibration pass, {:.1f} s meanwhile", chain + sum(seconds)
        errors, store = max(0.0, errors - (machine.devices - 1) * chain), max(0.0, store - chain)
    told = note or "on one device"
    yield Line("errors", errors, judged, note=told.format(judged / machine.doubles - errors))
    yield Line("store", store, moved=stored, note=note.format(stored / machine.disk - store))


# -- here ----------------------------------------------------------------------------------------------


def checked(source: str, dataset: str, device: str, *, rungs: int = 9, seqlen: int = 256, tokens: int = 32_768) -> None:
    """The paper beside the clock, with the rates of this machine."""
    dense = opened(source, device=device)
    place = next(dense.model.parameters()).device
    named = torch.cuda.get_device_name(place) if place.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{named}, {dense.model.dtype}, torch {torch.__version__}\n")
    recipe = Recipe.load("search").with_overrides(
        {"sparsity": 0.5, "data.dataset": dataset.split(","), "data.seqlen": seqlen, "data.search_tokens": 8192}
        | {"data.calibration_tokens": tokens}
    )
    draws = draw(dense.tokenizer, recipe.data)
    shape, whole = shaped(dense.model, dense.adapter, dense.model.dtype)  # type: ignore[arg-type]
    once = shape.forward(tokens, seqlen, head=False)
    machine = Machine(
        "this machine", forward=once / forward(dense, draws.calibration)["all"],
        products=products(dense, recipe, draws.calibration)["rate"], doubles=rate(place), launch=launch(place),
    )  # fmt: skip
    space = whole.zoomed(whole.uniform(), stride=1 / (rungs - 1), reach=rungs)
    told = {line.name: line.seconds for line in calibrated(shape, space, machine, tokens, seqlen)}
    spent = calibrate(dense, recipe, draws.calibration, "obs stream", rungs)
    print("| stage | seconds on paper | measured | measured / paper |\n|---|---|---|---|")
    for name, there in {"forward": "forward", "moments": "moments", "obs": "pruner", "errors": "errors"}.items():
        print(f"| calibration pass: {name} | {told[name]:.2f} | {spent[there]:.2f} | {spent[there] / told[name]:.2f} |")
    paper_all = told["forward"] + told["moments"] + told["obs"] + told["errors"]
    print(f"| calibration pass: all | {paper_all:.2f} | {spent['all']:.2f} | {spent['all'] / paper_all:.2f} |")
    objective = OBJECTIVES.build("divergence")
    with tempfile.TemporaryDirectory() as folder:
        store, centre = CandidateStore(Path(folder), {}), space.nearest(whole.uniform())
        pruner = PRUNERS.build("magnitude")
        errors = build(dense.model, dense.adapter, space, centre, pruner, draws.calibration, store, progress=Progress())
        net = Supernet(dense.model, dense.adapter, space, errors, store)
        objective.loss(net, centre, draws.search)  # the dense model's side is not on the clock
        begun = now()
        objective.loss(net, centre, draws.search)
        seconds = now() - begun
    flops = shape.forward(draws.search.n_tokens, seqlen, head=True, share=0.5)
    told_one = flops / machine.forward
    print(f"| search: a question | {told_one:.2f} | {seconds:.2f} | {seconds / told_one:.2f} |")
    print("\n| removals of all columns | seconds, launched | replayed | launched / replayed |\n|---|---|---|---|")
    for row in removals((site.d_in for site in space.sites if site.group_size == 1), place):
        print(row)


def removals(widths: Iterable[int], device: torch.device) -> Iterator[str]:
    """Rows of a table: seconds to remove all columns of a layer, launch by launch and replayed."""
    for n in sorted({*widths}):
        rng = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(rows, n, generator=rng, dtype=torch.float64).to(device) for rows in (2 * n, 256))
        hessian, spent, orders = x.T @ x / len(x), list[float](), list[list[int]]()
        for captures in ({}, replay.CAPTURES):
            with patch.object(replay, "CAPTURES", captures):
                remove_columns(hessian, weight, 2 * 64)  # what is paid for once
                begun = now()
                orders.append(remove_columns(hessian, weight, n))
                spent.append(now() - begun)
        assert orders[0] == orders[1]
        yield f"| {n} | {spent[0]:.2f} | {spent[1]:.2f} | {spent[0] / spent[1]:.2f} |"


def rate(device: torch.device, size: int = 1024) -> float:
    """FLOP/s of products in float64."""
    a = torch.randn(size, size, dtype=torch.float64, device=device)
    out = torch.mm(a, a)
    begun = now()
    for _ in range(5):
        torch.mm(a, a, out=out)
    return 5 * 2 * size**3 / (now() - begun)


def launch(device: torch.device) -> float:
    """Seconds of an operation on next to nothing."""
    a = torch.zeros(8, device=device)
    begun = now()
    for _ in range(10_000):
        a.add_(1)
    return (now() - begun) / 10_000


if __name__ == "__main__":
    typer.run(main)
