"""How far every allocator ends above the exact optimum of a real error table, found by dynamic programming.

    python benchmarks/oracle.py MODEL --dataset calibration.txt --seqlen 256

One calibration pass fills the table; after that no token is paid, and no allocator can be below 0 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from prunekit.calibration.fill import build
from prunekit.data.draws import draw
from prunekit.models.opening import opened
from prunekit.plugins.allocator import Problem
from prunekit.plugins.pruner import LocalPruner
from prunekit.plugins.registry import ALLOCATORS, PRUNERS, SIGNALS
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.spaces import whole_space
from prunekit.search.store import CandidateStore
from prunekit.system.progress import Progress
from prunekit.testing import best_allocation, converse


def main(
    model: str,
    dataset: str = "python-docs",
    seqlen: int = 256,
    tokens: Annotated[int, typer.Option(help="of calibration")] = 65_536,
    sparsity: Annotated[list[float] | None, typer.Option()] = None,
    seeds: Annotated[str, typer.Option(help="by comma")] = "0,1,2",
) -> None:
    """Print a Markdown table."""
    print("| sparsity | allocator | above the optimum | questions |\n|---|---|---|---|")
    for share in sparsity or [0.5]:
        data = {"data.dataset": dataset, "data.seqlen": seqlen, "data.calibration_tokens": tokens}
        recipe = Recipe.load().with_overrides({"sparsity": share, "data.search_tokens": seqlen, **data})
        dense = opened(model)
        whole = whole_space(resolve(recipe), dense.model, dense.adapter, dense.dtype)
        space = whole.zoomed(whole.uniform(), stride=1 / 16, reach=16)
        calibration = draw(dense.tokenizer, recipe.data).calibration
        with tempfile.TemporaryDirectory() as folder:
            store = CandidateStore(Path(folder), {})
            pruner, start = PRUNERS.build(recipe.pruner), space.nearest(whole.uniform())
            scored = type(pruner).scores is not LocalPruner.scores
            allocators = {name: ALLOCATORS.build(name) for name in ALLOCATORS}
            allocators = {name: a for name, a in allocators.items() if scored or "scores" not in a.needs}
            asked_for = [(name, signal) for name, a in allocators.items() for signal in map(SIGNALS.build, a.signals)]
            errors = build(
                dense.model, dense.adapter, space, start, pruner, calibration, store,
                signals=[signal for _, signal in asked_for], scores=scored, dtype=dense.dtype, progress=Progress(),
            )  # fmt: skip
            rows, scores = store.measured(space.sites, scores=scored)
        _, optimum = best_allocation(space, errors)
        for name, allocator in allocators.items():
            signals = tuple(row for row, (whose, _) in zip(rows, asked_for, strict=True) if whose == name)
            above, asked = [], []
            for seed in map(int, seeds.split(",")):
                problem = Problem(space, errors, start, seed, signals=signals, scores=scores)
                talk = converse(allocator, problem)
                found = sum(problem.error(i, kept) for i, kept in enumerate(talk.answer))
                above.append(found / optimum - 1)
                asked.append(sum(len(ask) for ask in talk.asks))
            print(f"| {share:.0%} | {name} | {min(above):.2%} to {max(above):.2%} | {sum(asked) // len(asked)} |")


if __name__ == "__main__":
    typer.run(main)
