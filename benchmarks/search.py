"""Answers of the supernet against a plain batched forward pass of the model as it will be built, in token-forwards.

    python benchmarks/search.py MODEL --dataset wikitext2-valid.txt

`alone`: allocations asked one by one. `together`: as many children as a generation has, each one exchange away from a
parent, over the tree of their prefixes. Both make the hidden states and logits that an objective reads; the plain pass
makes the logits of one of them as an assembled model, in batches as large. `judged` by the objective of the recipe, for
which the dense model's predictions are there. Rounds take turns; the median of the ratios
counts. With one thread the clock is the process's own, and other programs count little.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from calibration_pass import now

from prunekit.calibration.fill import build
from prunekit.data.draws import draw
from prunekit.data.tokens import TokenBatch
from prunekit.export.hf import to_transformers
from prunekit.models.blocks import chunks
from prunekit.models.opening import opened
from prunekit.plugins.registry import PRUNERS
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.spaces import whole_space
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation
from prunekit.system.progress import Progress


def main(
    model: str,
    dataset: str = "python-docs",
    seqlen: int = 512,
    tokens: int = 4096,
    children: int = 8,
    rounds: int = 3,
    sparsity: float = 0.3,
    threads: Annotated[int, typer.Option(help="on a CPU")] = 1,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Print a Markdown table."""
    torch.set_num_threads(threads)
    amounts = {"calibration_tokens": seqlen, "search_tokens": tokens, "evaluation_tokens": seqlen}
    data = {"dataset": dataset.split(","), "seqlen": seqlen} | amounts
    said = {f"data.{key}": value for key, value in data.items()}
    parts = resolve(Recipe.load().with_overrides({"sparsity": sparsity} | said))
    dense = opened(model, device=device, dtype=dtype)
    draws = draw(dense.tokenizer, parts.recipe.data)
    whole = whole_space(parts, dense.model, dense.adapter, dense.dtype)
    space = whole.zoomed(whole.uniform(), stride=1 / 16, reach=2)
    parent = space.nearest(whole.uniform())
    asked = exchanged(space, parent, children)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        store, magnitude = CandidateStore(Path(folder), {}), PRUNERS.build("magnitude")
        errors = build(
            dense.model, dense.adapter, space, parent, magnitude, draws.calibration, store, dtype=dense.dtype,
            progress=Progress(),
        )  # fmt: skip
        net = Supernet(dense.model, dense.adapter, space, errors, store)
        small = to_transformers(net.assemble(parent), dense.adapter)
        batch, found = draws.search, list[tuple[float, ...]]()
        for _ in range(rounds + 1):
            begun = now()
            for ids in chunks(batch):
                small(ids.to(small.device), use_cache=False).logits.sum()
            plain, begun = now() - begun, now()
            net.prefetch([], [])  # nothing is left of what was asked before
            answer(net, parent, batch)
            alone, begun = now() - begun, now()
            for ready in generations(net, asked, batch):
                answer(net, ready, batch)
            together, begun = (now() - begun) / len(asked), now()
            net.prefetch([], [])
            net.loss(parts.objective, parent, batch)
            found.append((plain, alone, together, now() - begun))
        found = found[1:]  # the first reads candidates from disk, and asks the dense model
    machine = f"{dense.model.device}, {str(dense.model.dtype)[6:]}, {torch.get_num_threads()} threads"
    print(f"{tokens:,} tokens in windows of {seqlen}; {machine}\n\n| | token-forwards a second | of a plain forward |")
    print("|---|---|---|")
    for i, name in enumerate(["a plain forward pass", "alone", f"together, {children} children", "alone, judged"]):
        pace, ratio = (statistics.median(row) for row in ([tokens / r[i] for r in found], [r[0] / r[i] for r in found]))
        print(f"| {name} | {pace:,.0f} | {ratio:.2f} |")


def exchanged(space: Space, parent: Allocation, count: int) -> list[Allocation]:
    """Children of a parent: one site a rung down, another a rung up; what they cost does not matter here."""
    chance, children = random.Random(0), list[Allocation]()
    while len(children) < count:
        child = list(parent)
        for site, step in zip(chance.sample(range(len(child)), 2), (-1, 1), strict=True):
            ladder = space.ladders[site]
            child[site] = ladder[min(max(ladder.index(child[site]) + step, 0), len(ladder) - 1)]
        if (made := tuple(child)) != parent and made not in children:
            children.append(made)
    return children


def answer(net: Supernet, allocation: Allocation, batch: TokenBatch) -> None:
    """All logits, as an objective reads them."""
    for _, logits in net.logits(allocation, batch):
        logits.sum()


def generations(net: Supernet, asked: list[Allocation], batch: TokenBatch) -> Iterator[Allocation]:
    """All that are asked, as many together as memory is given to."""
    rest = asked
    while rest:
        ready = net.prefetch(rest, [batch])
        yield from ready
        rest = rest[len(ready) :]


if __name__ == "__main__":
    typer.run(main)
