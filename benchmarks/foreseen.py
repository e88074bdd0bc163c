"""What `prunekit plan` foresees, and what `prunekit prune` with the same options takes: recipe by recipe.

    python benchmarks/foreseen.py MODEL --recipes fast,lean,search --sparsity 0.5 --dataset wikitext2-valid.txt \\
        --seqlen 256 --set data.calibration_tokens=16384

A plan comes right before its run, for it knows this machine as it is at that moment. Both are processes of their own;
the seconds of a run are those of its stages: libraries are loaded in `open`, the start of Python is not in them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

STAGES = {"open": "open", "dense": "evaluate", "evaluate": "evaluate", "search": "search", "export": "export"}
"""Which stage of a report the first word of a plan's stage is part of; the others are passes, `prune`."""


def main(
    model: str,
    recipes: str = "fast,lean,search",
    sparsity: float = 0.5,
    dataset: str = "python-docs",
    seqlen: int | None = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="as of prunekit prune")] = None,
    rows: Path | None = None,
) -> None:
    """Print a Markdown table."""
    print("| recipe | foreseen | between | took | took / foreseen | by stage |")
    print("|---|---|---|---|---|---|")
    for recipe in recipes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            options = [model, "--recipe", recipe, "--sparsity", str(sparsity), "--dataset", dataset, "--output", out]
            options += [] if seqlen is None else ["--seqlen", seqlen]
            options += [part for each in setting or [] for part in ("--set", each)]
            plan = json.loads(_prunekit("plan", *options, "--json"))
            _prunekit("prune", *options, "--quiet")
            report = json.loads((out / "report.json").read_text())
        foreseen, took = plan["seconds_known"], sum(report["seconds"].values())
        least = sum((stage["between"] or [stage["seconds"]] * 2)[0] or 0 for stage in plan["stages"])
        most = sum((stage["between"] or [stage["seconds"]] * 2)[1] or 0 for stage in plan["stages"])
        expected: dict[str, float] = dict.fromkeys(report["seconds"], 0.0)
        for stage in plan["stages"]:
            name = STAGES.get(stage["name"].split()[0], "prune")
            expected[name] = expected.get(name, 0.0) + (stage["seconds"] or 0.0)
        stages = ", ".join(
            f"{name} {report['seconds'].get(name, 0):.0f} of {seconds:.0f}" for name, seconds in expected.items()
        )
        print(
            f"| `{recipe}` | {foreseen:.0f} s | {least:.0f} to {most:.0f} s | {took:.0f} s | {took / foreseen:.2f} "
            f"| {stages} |", flush=True,
        )  # fmt: skip
        if rows is not None:
            with rows.open("a") as file:
                file.write(json.dumps({"recipe": recipe, "model": model, "plan": plan, "report": report}) + "\n")


def _prunekit(*words: object) -> str:
    command = [sys.executable, "-c", "from prunekit.cli.main import main; main()", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    typer.run(main)
