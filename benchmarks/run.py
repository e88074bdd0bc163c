"""Cells to rows: prune one model after every cell of cells.yaml and write what came of it as JSON lines.

    python benchmarks/run.py MODEL --dataset calibration.txt --evaluation test.txt --seqlen 256 --rows rows.jsonl

A row that is in the file already is not run again, so a run can be stopped and gone on with.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import prunekit
from prunekit.recipe.overrides import parsed
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe

CELLS = Path(__file__).parent / "cells.yaml"


def main(
    model: str,
    dataset: Annotated[str, typer.Option(help="several by comma")] = "python-docs",
    evaluation: str | None = None,
    seqlen: int = 256,
    tokens: Annotated[int, typer.Option(help="of calibration, of search and of evaluation, each")] = 65_536,
    sparsity: Annotated[list[float] | None, typer.Option()] = None,
    groups: Annotated[str, typer.Option(help="groups of cells, by comma")] = "uniform,stream,search,tyr",
    seeds: Annotated[str, typer.Option(help="by comma; closed forms take the first")] = "0",
    rows: Path = Path("rows.jsonl"),
    setting: Annotated[list[str] | None, typer.Option("--set", help="key.path=value for every cell")] = None,
) -> None:
    """Run what is not in `rows` yet."""
    cells: dict[str, dict[str, Any]] = yaml.safe_load(CELLS.read_text())
    done = {row["recipe"] for row in _read(rows)}
    for share in sparsity or [0.5]:
        for group in groups.split(","):
            for name, changes in cells[group].items():
                drawn = changes.get("objective") != "expected-error"  # else the seed has no say
                for seed in [int(s) for s in seeds.split(",")][: None if drawn else 1]:
                    shared = {
                        "model": model,
                        "sparsity": share,
                        "seed": seed,
                        "verify": False,
                        "data.dataset": dataset.split(","),
                        "data.evaluation_dataset": evaluation,
                        "data.seqlen": seqlen,
                        "data.calibration_tokens": tokens,
                        "data.search_tokens": tokens,
                        "data.recovery_tokens": tokens,
                        "data.evaluation_tokens": tokens,
                    }
                    own = {key: value for key, value in changes.items() if key != "recipe"}
                    recipe = Recipe.load(changes.get("recipe", "search")).with_overrides(shared).with_overrides(own)
                    allocator = (recipe.allocator or {}).get("name")
                    kept = dict(parsed(s) for s in setting or [])
                    recipe = recipe.with_overrides(
                        {k: v for k, v in kept.items() if not k.startswith("allocator.") or allocator == "tyr"}
                    )
                    row = {"cell": name, "sparsity": share, "seed": seed, "recipe": (digest := resolve(recipe).digest)}
                    if digest in done:
                        continue
                    begun = time.perf_counter()
                    report = prunekit.prune(recipe=recipe, quiet=True).report
                    row |= {"wall": time.perf_counter() - begun, "report": report}
                    with rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(name, share, seed, f"{report['losses']['pruned']['perplexity']:.2f}", f"{row['wall']:.0f} s")


def _read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


if __name__ == "__main__":
    typer.run(main)
