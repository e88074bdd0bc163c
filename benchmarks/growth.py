"""By what law cost grows: with tokens, layers, rungs, neurons and candidates, on Llamas of random weights.

    python benchmarks/growth.py --what tokens,layers,rungs,neurons,candidates

One number doubles, the rest stay. An exponent of 1 between two rows is proportional, 0 is for nothing. The best of
`--rounds` counts.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit.calibration.fill import build
from prunekit.data.tokens import TokenBatch
from prunekit.layer.problem import LayerProblem
from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.registry import OBJECTIVES, PRUNERS
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.spaces import whole_space
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.space.ladders import Space
from prunekit.system.progress import Progress

LAWS = {
    "tokens": "1, when the linear algebra of a site is small beside its tokens",
    "layers": "1",
    "rungs": "well below 1: one pass finds the order and every count; what is per rung is to round, judge and store",
    "neurons": "between 2, the products of updates, and 3, the factors",
    "candidates": "below 1: equal beginnings are run once",
}


@dataclass(frozen=True)
class Size:
    """Of one measurement."""

    tokens: int = 8192
    layers: int = 4
    rungs: int = 9
    candidates: int = 16
    width: int = 256
    neurons: int = 768
    seqlen: int = 256

    @property
    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024, hidden_size=self.width, intermediate_size=self.neurons, num_hidden_layers=self.layers,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=self.seqlen,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval().requires_grad_(False)

    @property
    def batch(self) -> TokenBatch:
        drawn = torch.Generator().manual_seed(0)
        return TokenBatch(torch.randint(0, 1024, (self.tokens // self.seqlen, self.seqlen), generator=drawn), "random")

    def space(self, model: LlamaForCausalLM) -> Space:
        whole = whole_space(resolve(Recipe.load()), model, adapter_for("llama"), torch.float32)
        return whole.zoomed(whole.uniform(), stride=1 / (self.rungs - 1), reach=self.rungs)


def main(
    what: Annotated[str, typer.Option(help="by comma")] = ",".join(LAWS),
    pruner: str = "obs",
    rounds: int = 3,
    most_neurons: Annotated[int, typer.Option(help="14336 needs 12 GB and minutes")] = 4096,
) -> None:
    """Print a Markdown table for each."""
    base = Size()
    for name in what.split(","):
        unit = "seconds of a pass over one MLP" if name == "neurons" else "seconds"
        print(f"\nexpected exponent: {LAWS[name]}\n\n| {name} | {unit} | exponent |\n|---|---|---|")
        before: tuple[int, float] | None = None
        for count, job in jobs(name, base, pruner, most_neurons):
            spent = min(job() for _ in range(rounds))
            law = f"{math.log(spent / before[1]) / math.log(count / before[0]):.2f}" if before else ""
            print(f"| {count:,} | {spent:.2f} | {law} |", flush=True)
            before = count, spent


def jobs(name: str, base: Size, pruner: str, most: int) -> Iterator[tuple[int, Callable[[], float]]]:
    """Counts, and what takes so many seconds."""
    if name == "neurons":
        for neurons in (n for n in (512, 1024, 2048, 4096, 8192, 14_336) if n <= most):
            layer = mlp(neurons)
            yield neurons, lambda layer=layer: nested(layer, pruner)
    elif name == "candidates":
        with tempfile.TemporaryDirectory() as folder:
            net, _ = calibrated(base, pruner, folder)
            for count in (1, 2, 4, 8, 16, 32):  # of 57 that are one exchange away
                yield count, lambda count=count: generation(net, base.batch, count)
    else:
        steps = {"tokens": (4096, 8192, 16_384, 32_768), "layers": (2, 4, 8, 16), "rungs": (3, 5, 9, 17, 33)}
        for count in steps[name]:
            size = replace(base, **{name: count})

            def job(size: Size = size) -> float:
                with tempfile.TemporaryDirectory() as folder:
                    return calibrated(size, pruner, folder)[1]

            yield count, job


def calibrated(size: Size, pruner: str, folder: str) -> tuple[Supernet, float]:
    """A supernet, and the seconds of its calibration pass."""
    model, store = size.model, CandidateStore(Path(folder), {})
    space, begun = size.space(model), time.perf_counter()
    centre = space.nearest(space.uniform())
    errors = build(
        model, adapter_for("llama"), space, centre, PRUNERS.build(pruner), size.batch, store, progress=Progress()
    )
    return Supernet(model, adapter_for("llama"), space, errors, store), time.perf_counter() - begun


def generation(net: Supernet, batch: TokenBatch, count: int) -> float:
    """Seconds to judge that many children of one parent, each one exchange between two sites away."""
    objective, drawn = OBJECTIVES.build("divergence"), torch.Generator().manual_seed(0)
    parent = net.space.nearest(net.space.uniform())
    children, ladders = {parent: None}, net.space.ladders
    while len(children) < count:
        rungs = list(net.space.rungs(parent))
        up, down = torch.randperm(len(rungs), generator=drawn)[:2].tolist()
        if rungs[up] + 1 < len(ladders[up]) and rungs[down] > 0:
            rungs[up], rungs[down] = rungs[up] + 1, rungs[down] - 1
            children[net.space.allocation(tuple(rungs))] = None
    objective.loss(net, parent, batch)  # the dense model's side is not on the clock
    begun, rest = time.perf_counter(), list(children)
    while rest:
        ready = net.prefetch(rest, [batch])
        for allocation in ready:
            objective.loss(net, allocation, batch)
        rest = [allocation for allocation in rest if allocation not in ready]
    return time.perf_counter() - begun


def mlp(neurons: int, width: int = 256) -> LayerProblem:
    """The down projection of an MLP whose neurons are correlated."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(2 * neurons, neurons // 4, generator=drawn) @ torch.randn(neurons // 4, neurons, generator=drawn)
    x += torch.randn(2 * neurons, neurons, generator=drawn)
    return LayerProblem(torch.randn(width, neurons, generator=drawn), x.T @ x / len(x))


def nested(layer: LayerProblem, pruner: str) -> float:
    """Seconds from the moments to candidates at every eighth of the neurons."""
    fresh, begun = replace(layer), time.perf_counter()  # nothing is remembered
    PRUNERS.build(pruner).prune(fresh, [layer.n_groups * k // 8 for k in range(9)])
    return time.perf_counter() - begun


if __name__ == "__main__":
    typer.run(main)
