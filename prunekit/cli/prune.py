"""`prunekit prune`: a smaller model, or a family of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.options import (
    MACHINE,
    METHOD,
    RUN,
    TEXT,
    Dataset,
    Model,
    ModelOption,
    Quiet,
    Set,
    chosen_recipe,
    parse_shares,
)
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import comparison, members, print_table, rows_of_report


def prune(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the result.")] = None,
    sparsity: Annotated[
        Any,
        typer.Option(
            parser=parse_shares,
            metavar="SHARE",
            help="Share of the blocks' parameters to remove (with --structure weights or 2:4, of the weights in their "
            "linear maps). Several by comma make a family of models.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC=SHARE",
            help="Share to keep, instead of --sparsity: parameters=0.5, bytes, flops, kv-cache, or latency=0.6 as "
            "measured on this machine. Several by comma make a family of models.",
        ),
    ] = None,
    structure: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Unit of removal: groups (heads and neurons), weights, or a pattern such as 2:4."
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(metavar="NAME", help="Preset, YAML file, or folder of a pruned model.", rich_help_panel=METHOD),
    ] = "default",
    pruner: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Method that selects what to keep in one layer.", rich_help_panel=METHOD),
    ] = None,
    allocator: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Method that decides how much each layer keeps.", rich_help_panel=METHOD),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure by which allocations are compared.", rich_help_panel=METHOD),
    ] = None,
    finisher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Recovery step after pruning, instead of the recipe's. Repeatable, in the order given.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    exporter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Format of the result, beside the folder for transformers. Repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    carry: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Activations passed on to the next block: dense, centre or expected.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    set_: Set = None,
    dataset: Dataset = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Number of tokens for layer statistics.", rich_help_panel=TEXT)
    ] = None,
    search_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Number of tokens for comparing allocations.", rich_help_panel=TEXT)
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(metavar="N", help="Number of tokens per window.", rich_help_panel=TEXT)
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Place of the computation: local, ray or ray://HOST:PORT.", rich_help_panel=MACHINE
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="auto, cpu, cuda or cuda:1; several devices by comma.", rich_help_panel=MACHINE
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Number format of the computation: auto, float32, bfloat16, float16 or float64.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory to use, e.g. 8GiB; auto: what is free.", rich_help_panel=MACHINE),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Random seed; the same seed gives the same model.", rich_help_panel=RUN),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continuation of an interrupted run of the same recipe.", rich_help_panel=RUN)
    ] = True,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replacement of an earlier result in --output.", rich_help_panel=RUN),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Prune a model, e.g. prunekit prune MODEL --sparsity 0.5 --output DIR. The recipe has the other values."""
    chosen, source, several = chosen_recipe(locals(), "prune")
    assert output is not None
    from prunekit.report.document import gained, kept_promise, promise
    from prunekit.run import prune as pruning
    from prunekit.system.progress import progress_for

    quiet_libraries()
    if several:
        from prunekit.run.family import FILE, family

        found = family(chosen, output=output, progress=progress_for(quiet), resume=resume, overwrite=overwrite)
        print_table(members(str(output), found.document))
        typer.echo(f"details: {output / FILE}")
        return
    result = pruning.prune(chosen, output=output, progress=progress_for(quiet), resume=resume, overwrite=overwrite)
    print_table(comparison(str(output), *rows_of_report(result.report, source, output)))
    if "weights" in result.report:
        typer.echo(gained(result.report["weights"]))
    if (found := promise(result.report)) is not None:
        typer.echo(kept_promise(found))
