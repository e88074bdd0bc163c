"""`prunekit report`: the page of a run, a family, a study or a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.options import switch
from prunekit.errors import WrongInput


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Results, families, studies or comparisons.", show_default=False),
    ],
    *,
    output: Annotated[Path, switch("The file.", None, "--output", "-o")] = Path("report.html"),
    overwrite: Annotated[bool, switch("Replacement of a file that is there.", None, "--overwrite")] = False,
) -> None:
    """Write one page about runs: a single file with tables and charts that needs no network."""
    from prunekit.report.page import write_page

    if output.exists() and not overwrite:
        raise WrongInput(f"{output} exists; choose another --output, or replace it with --overwrite")
    if not output.parent.is_dir():
        raise WrongInput(f"there is no folder {output.parent} for {output.name}; make it first")
    typer.echo(f"page: {write_page(folders, output)}")
