"""What a time buys: asked and taken, the text that was chosen, and perplexity.

    python benchmarks/timed.py MODEL --times 2m,5m,15m --recipe default-recover --dataset calibration.txt \\
        --evaluation test.txt --seqlen 512 --sparsity 0.3 --rows timed.jsonl

Every row is a process of its own, timed whole: start, verification and all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from prunekit.system.times import as_seconds


def main(
    model: str,
    times: str = "2m,5m",
    recipe: str = "default-recover",
    sparsity: float = 0.3,
    dataset: str = "python-docs",
    evaluation: str | None = None,
    seqlen: int | None = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="as of prunekit prune")] = None,
    rows: Path | None = None,
) -> None:
    """Print a Markdown table."""
    print("| asked | took | of it | calibration | recovery | steps | search | perplexity | unfinished | dense |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for asked in times.split(","):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            options = {
                "--recipe": recipe,
                "--sparsity": sparsity,
                "--time": asked,
                "--dataset": dataset,
                "--output": out,
            }
            options |= {} if seqlen is None else {"--seqlen": seqlen}
            settings = [*(setting or []), *([] if evaluation is None else [f"data.evaluation_dataset={evaluation}"])]
            command = [sys.executable, "-c", "from prunekit.cli.main import main; main()", "prune", model, "--quiet"]
            command += [str(part) for pair in options.items() for part in pair]
            command += [part for each in settings for part in ("--set", each)]
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            took = time.perf_counter() - began
            report = json.loads((out / "report.json").read_text())
        data, losses, wanted = report["data"], report["losses"], as_seconds(asked) or 1.0
        options_of = [said.get("options", {}) for said in report["finishers"]]
        steps = ", ".join(str(sum(found["steps"]) if found["steps"] else 0) for found in options_of if "steps" in found)
        print(
            f"| {asked} | {took:.0f} s | {took / wanted:.0%} | {data['calibration']['tokens']:,} "
            f"| {data.get('recovery', {}).get('tokens', 0):,} | {steps} | {report['search']['token_forwards']:,} "
            f"| {losses['pruned']['perplexity']:.2f} | {losses.get('unfinished', losses['pruned'])['perplexity']:.2f} "
            f"| {losses['dense']['perplexity']:.2f} |", flush=True,
        )  # fmt: skip
        if rows is not None:
            with rows.open("a") as file:
                file.write(json.dumps({"asked": asked, "took": took, "report": report}) + "\n")


if __name__ == "__main__":
    typer.run(main)
