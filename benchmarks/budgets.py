"""Budgets that were searched teach a network the others: what it answers against what a search finds, one row each.

    python benchmarks/budgets.py MODEL --dataset search.txt --simulations 60 --tokens 1024 --search-tokens 4096

One calibration pass along the rungs of all budgets; a search of each; the network learns from every second one, and the
others are what it never saw. Its answers and the searches' are judged on the same rungs and tokens; so are those of a
network that learns the searches' answers themselves, as published.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from prunekit.recipe.schema import Recipe
from prunekit.run.learn_budgets import searched
from prunekit.run.prune import open_runs, run_search
from prunekit.run.session import Job
from prunekit.system.progress import progress_for

SHARES = "0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.55,0.6,0.65,0.7"


def main(
    model: str,
    dataset: str = "python-docs",
    shares: Annotated[str, typer.Option(help="by comma, ascending; the first, the third … are learnt from")] = SHARES,
    simulations: int = 300,
    tokens: Annotated[int, typer.Option(help="to judge a node on")] = 2_048,
    calibration_tokens: int = 16_384,
    search_tokens: int = 16_384,
    seqlen: int = 256,
    setting: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
) -> None:
    """Print a table."""
    from prunekit.recipe.overrides import parsed

    asked = [float(share) for share in shares.split(",")]
    changes = {
        "model": model,
        "sparsity": asked,
        "allocator": {"name": "lop", "simulations": simulations, "tokens": tokens},
        "data.dataset": dataset,
        "data.seqlen": seqlen,
        "data.calibration_tokens": calibration_tokens,
        "data.search_tokens": search_tokens,
        "data.evaluation_tokens": seqlen,
    } | dict(map(parsed, setting or []))
    recipe = Recipe.load("lop").spread(changes)
    assert recipe is not None
    with open_runs(recipe, Job(progress=progress_for(quiet=False)), asked) as (_, opened):
        runs = sorted(opened, key=lambda run: run.parts.recipe.sparsity)
        found = run_search(runs)
        seconds = [run.clock.seconds["search"] for run in runs]
        with TemporaryDirectory() as folder:
            allocator = runs[0].parts.allocator
            answering = []
            for name, grid in ("published", 0), ("fitted", allocator.grid):  # type: ignore[attr-defined]
                begun = time.perf_counter()
                learner = replace(allocator, grid=grid)  # type: ignore[type-var]
                (Path(folder) / name).mkdir()
                learner.learn([searched(run) for run in reversed(runs[::2])], Path(folder) / name)  # ascending
                print(
                    f"{name}: learnt from {len(runs[::2])} budgets in {time.perf_counter() - begun:.1f} s", flush=True
                )
                answering.append(replace(learner, model=str(Path(folder) / name)))
            print(
                "removed | uniform | search | as published | network | network / search | token-forwards | search s | s"
            )
            for run, (net, answer), spent in list(zip(runs, found, seconds, strict=True))[1::2]:
                space = allocator.first_space(run.whole)
                begun = time.perf_counter()
                published, predicted = (one.predicted(space) for one in answering)
                took = (time.perf_counter() - begun) / 2
                objective, judged = run.parts.objective, run.draws.search
                losses = [net.loss(objective, a, judged) for a in (space.uniform(), answer, published, predicted)]
                cells = [f"{run.parts.recipe.sparsity:.1%}", *(f"{loss:.4f}" for loss in losses)]
                cells += [f"{losses[3] / losses[1]:.3f}", f"{run.ledger.tokens:,}", f"{spent:.1f}", f"{took:.3f}"]
                print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    typer.run(main)
