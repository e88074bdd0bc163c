"""The command line, a function per command.

Nothing heavy is imported before it is needed, so that help and wrong flags answer at once. Wrong input is one
sentence on stderr and exit code 2.
"""

from __future__ import annotations

import os
from importlib import metadata
from typing import Annotated

import typer

from prunekit.cli.check import check
from prunekit.cli.compare import compare
from prunekit.cli.completion import completion, prepare
from prunekit.cli.demo import demo
from prunekit.cli.doctor import doctor
from prunekit.cli.errors import Sentences
from prunekit.cli.evaluate import evaluate
from prunekit.cli.export import export
from prunekit.cli.learn_budgets import learn_budgets
from prunekit.cli.listing import list_
from prunekit.cli.new import new
from prunekit.cli.plan import plan
from prunekit.cli.prune import prune
from prunekit.cli.report import report
from prunekit.cli.show import show
from prunekit.cli.tune import tune
from prunekit.cli.verify import verify

app = typer.Typer(
    cls=Sentences,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Structured, unstructured and semi-structured (N:M) pruning of language models.",
)
for command in (
    prune,
    plan,
    export,
    verify,
    compare,
    report,
    show,
    tune,
    evaluate,
    new,
    check,
    doctor,
    completion,
    demo,
):
    app.command()(command)
app.command("learn-budgets")(learn_budgets)
app.command("list")(list_)


def main() -> None:
    """The console script."""
    prepare()
    app(prog_name="prunekit")  # whatever the file is called: shells ask by this name


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunekit {metadata.version('prunekit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Version number.")
    ] = False,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a fork after use would warn
