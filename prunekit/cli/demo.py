"""`prunekit demo`: the bundled model, pruned offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.options import JsonLines, Quiet
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import comparison, print_table


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")] = Path("demo-output"),
    quiet: Quiet = False,
    json_lines: JsonLines = None,
) -> dict[str, Any]:
    """Prune the bundled model to half of its blocks, offline, and compare."""
    from prunekit.demo.run import run
    from prunekit.system.progress import progress_for

    quiet_libraries()
    found = run(output, progress_for(quiet))
    print_table(comparison(str(output), found.dense, found.pruned, found.speed))
    typer.echo("speed: " + found.timed.replace("; ", "\n  "))
    typer.echo(f"loaded back in a fresh process: logits differ by at most {found.difference:.1e}")
    return {"output": output, "dense": found.dense, "pruned": found.pruned, "difference": found.difference}
