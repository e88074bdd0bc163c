"""Promised against realised time: one price table, one pruned model for every target, all loaded and timed in turns.

    python benchmarks/latency.py MODEL --dataset calibration.txt --targets 0.8,0.6,0.4 --device cpu

Ratios to the dense model in the same turns. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from prunekit.measure import latency
from prunekit.measure.evaluate import load
from prunekit.recipe.overrides import parsed
from prunekit.recipe.schema import Recipe
from prunekit.run.prune import prune
from prunekit.run.session import Job
from prunekit.space.prices import Prices
from prunekit.system.progress import progress_for


def main(
    model: str,
    dataset: str = "python-docs",
    targets: Annotated[str, typer.Option(help="shares of the dense model's time, by comma")] = "0.8,0.6,0.4",
    recipe: str = "fast",
    device: str = "cpu",
    seqlen: int = 256,
    tokens: Annotated[int, typer.Option(help="of calibration, of search and of evaluation, each")] = 16_384,
    setting: Annotated[list[str] | None, typer.Option("--set", help="key.path=value: latency.new_tokens=32")] = None,
) -> None:
    """Print a Markdown table."""
    shared = {"model": model, "device": device, "verify": False, "data.dataset": dataset, "data.seqlen": seqlen}
    shared |= {f"data.{part}_tokens": tokens for part in ("calibration", "search", "evaluation")}
    base, table = Recipe.load(recipe).with_overrides(shared | dict(map(parsed, setting or []))), {}
    reports, progress = {}, progress_for()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {share: Path(scratch, share) for share in targets.split(",")}
        for share, folder in folders.items():
            chosen = base.with_overrides({"target": f"latency={share}", **table})
            reports[share] = prune(chosen, Job(output=folder, progress=progress)).report
            table = {"latency.prices": str(folder)}
        prices = Prices.load(table["latency.prices"])
        nets = {"dense": load(model, device=device), **{s: load(str(f), device=device) for s, f in folders.items()}}
        samples = latency.sampled(
            {key: lambda net=net: net.eval() for key, net in nets.items()},
            prices.workload, progress, "time all", rounds=2 * latency.ROUNDS,
        )  # fmt: skip
    times, noise = latency.typical(samples)
    print(
        f"{prices.workload} on {latency.hardware(nets['dense'])}; times vary by {noise:.1%}, in the table by", end=" "
    )
    print(f"{prices.noise:.1%}; {prices.outside / prices.dense:.1%} outside of sub-layers\n")
    print(
        "| target | promised | realised | miss | in its run | parameters | perplexity |\n|---|---|---|---|---|---|---|"
    )
    dense = _perplexity(next(iter(reports.values())), "dense")
    print(f"| dense | | {times['dense'] / 1e6:.2f} ms | | | | {dense:.2f} |")
    for share, report in reports.items():
        told, found = report["latency"], times[share] / times["dense"]
        print(
            f"| {share} | {told['promised']:.3f} | {found:.3f} | {found / told['promised'] - 1:+.1%} "
            f"| {told['miss']:+.1%} | {report['pruned']['parameters'] / report['dense']['parameters']:.3f} "
            f"| {_perplexity(report, 'pruned'):.2f} |"
        )


def _perplexity(report: dict, which: str) -> float:
    return report["losses"][which]["perplexity"]


if __name__ == "__main__":
    typer.run(main)
