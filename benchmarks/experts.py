"""Experts in an ONNX graph: one node for every layer, beside nodes of their own for every expert.

    python benchmarks/experts.py --experts 8,32,128 --each 32

A Qwen3-MoE of two layers and random weights is written as the exporter `onnx` does, and once more with the loop over
experts unrolled. Times are seconds and milliseconds of the processor, the least of several runs, on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import onnx
import torch
import typer

import prunekit as pk
from prunekit.testing import tiny
from prunekit_strategies.exporters import onnx as exporter

HIDDEN, NEURONS, READ = 256, 256, 128  # channels, neurons of an expert, tokens of a prompt


def unrolled(step: Any, total: Any, stacks: Sequence[Any]) -> Any:
    """As `_scan` of the exporter, said once for every slice."""
    for place in range(len(stacks[0])):
        total, _ = step(total, [stack[place] for stack in stacks])
    return total


def model_of(experts: int, selected: int) -> Any:
    sizes: dict[str, Any] = {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": selected}
    sizes |= {"hidden_size": HIDDEN, "moe_intermediate_size": NEURONS, "head_dim": 32, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 1024, "max_position_embeddings": 512, "mlp_only_layers": []}
    return tiny("qwen3_moe", **sizes, initializer_range=0.02).float().requires_grad_(False)


def least(what: Callable[[], Any], runs: int) -> float:
    """Seconds of the processor, in this thread."""
    spent = list[float]()
    for _ in range(runs):
        begun = time.thread_time()
        what()
        spent.append(time.thread_time() - begun)
    return min(spent)


def measured(model: Any, path: Path) -> str:
    """What writing, opening and running a graph takes, as a row of a table."""
    written = least(lambda: exporter.ONNX().write(pk.Product(model), path), 1)
    graph = onnx.load(path / exporter.MODEL)
    nodes = sum(1 for part in (graph.graph, *graph.functions) for _ in exporter._nodes(part))
    beside = sum(file.stat().st_size for file in path.iterdir()) - 4 * sum(p.numel() for p in model.parameters())
    opened = least(lambda: exporter._opened(path), 3)
    session, ids = exporter._opened(path), torch.arange(2, 2 + READ)[None].numpy()
    past = session.step(ids, session.empty(1))[1]
    read, made = (
        least(lambda: session.step(ids, session.empty(1)), 8),
        least(lambda: session.step(ids[:, :1], past), 20),
    )
    sizes = f"{nodes:,} | {beside / 1e3:.0f} kB"
    return f"{sizes} | {written:.1f} s | {opened:.2f} s | {read:.1f} ms | {made:.2f} ms"


def main(
    experts: Annotated[str, typer.Option(help="of a layer, by comma")] = "8,32,128",
    each: Annotated[int, typer.Option(help="experts up to which every one has nodes of its own, too")] = 32,
    selected: Annotated[int, typer.Option(help="experts of a token")] = 4,
) -> None:
    """Print a row for every number of experts and every way to say them."""
    torch.set_num_threads(1)
    typer.echo("| experts | nodes for | nodes | beside weights | written | opened | 128 tokens read | one made |")
    typer.echo("|---" * 8 + "|")
    scan = exporter._scan
    for count in map(int, experts.split(",")):
        for name, way in (("a layer", scan), ("an expert", unrolled)):
            if way is unrolled and count > each:
                continue
            exporter._scan = way
            with TemporaryDirectory() as folder:
                typer.echo(f"| {count} | {name} | {measured(model_of(count, selected), Path(folder) / 'onnx')} |")


if __name__ == "__main__":
    typer.run(main)
