"""`prunekit new`: a plug-in package to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.completion import one_of, plugin_kinds
from prunekit.cli.options import option, switch
from prunekit.errors import WrongInput

NAME = "Name of the plug-in, as recipes will say it; of an adapter, the model_type of its models."
KIND = "Kind of plug-in, e.g. pruner, allocator, objective or finisher; prunekit list has all."


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help=NAME, show_default=False)],
    *,
    kind: Annotated[str | None, option(KIND, autocompletion=one_of(plugin_kinds))] = None,
    output: Annotated[
        Path | None, switch("New folder for the package; otherwise prunekit-NAME.", None, "--output", "-o")
    ] = None,
) -> None:
    """Write a plug-in package that installs, passes its suite and does something: change the formula in it."""
    from prunekit.plugins.registry import KINDS
    from prunekit.templates.package import write_package

    if kind is None:
        raise WrongInput(f"no --kind was given; there are {', '.join(registry.kind for registry in KINDS)}")
    made = write_package(name, kind, output)
    for file in made.files:
        typer.echo(made.folder / file)
    typer.echo(f"\npip install -e {made.folder}\nprunekit check {name} --kind {kind}\n{made.uses}")
