"""`prunekit tune`: a search for a better recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.options import (
    RUN,
    Dataset,
    Model,
    ModelOption,
    Quiet,
    Set,
    given_model,
    needed_model,
    several_datasets,
)
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import print_table, standings
from prunekit.errors import WrongInput

SEARCH = "Search"  # heading of its options


def tune(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the study.")] = None,
    recipe: Annotated[
        str,
        typer.Option(metavar="NAME", help="Recipe to improve: preset, YAML file, or folder of a pruned model."),
    ] = "default",
    sparsity: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Share of the blocks' parameters to remove.")
    ] = None,
    set_: Set = None,
    space: Annotated[
        str, typer.Option(metavar="NAME", help="Choices to search: preset or YAML file.", rich_help_panel=SEARCH)
    ] = "default",
    trials: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Number of recipes to try, earlier runs included.", rich_help_panel=SEARCH
        ),
    ] = 50,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to minimise: perplexity (if none is given), loss, objective, parameters or seconds. Repeatable; "
            "several give a Pareto front.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    sampler: Annotated[
        str, typer.Option(metavar="NAME", help="tpe, nsga-ii or nsga-iii.", rich_help_panel=SEARCH)
    ] = "tpe",
    dataset: Dataset = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Optuna storage, e.g. sqlite:///my.db; otherwise study.log in the folder.",
            rich_help_panel=RUN,
        ),
    ] = None,
    study_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name in that storage; otherwise that of the folder.", rich_help_panel=RUN),
    ] = None,
    disk: Annotated[
        float,
        typer.Option(
            metavar="GB", min=0, help="Disk space for candidates that later trials reuse.", rich_help_panel=RUN
        ),
    ] = 20,
    resume: Annotated[bool, typer.Option(help="Continuation of an interrupted study.", rich_help_panel=RUN)] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replacement of an earlier study in --output.", rich_help_panel=RUN)
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Search for a better recipe. Trials are compared on the search text, never on the test text."""
    from prunekit.recipe.choices import Choices
    from prunekit.recipe.overrides import parsed
    from prunekit.recipe.schema import Recipe

    flags = {"model": given_model(model, model_option), "sparsity": sparsity, "data.dataset": several_datasets(dataset)}
    given = {key: value for key, value in flags.items() if value is not None}
    chosen = Recipe.load(recipe).with_overrides(given | dict(map(parsed, set_ or [])))
    choices = Choices.load(space)
    needed_model(chosen.model, "prunekit tune MODEL --output DIR")
    if output is None:
        raise WrongInput("no --output was given; name a new folder for the study")

    from prunekit.run import tune as tuning
    from prunekit.system.progress import progress_for

    quiet_libraries()
    tuned = tuning.tune(
        chosen,
        choices,
        trials=trials,
        output=output,
        metrics=[name for text in metric or ["perplexity"] for name in text.split(",")],
        sampler=sampler,  # type: ignore[arg-type]  # checked there
        storage=storage,
        study_name=study_name,
        progress=progress_for(quiet),
        resume=resume,
        overwrite=overwrite,
        disk=round(disk * 1e9),
    )
    print_table(standings(tuned))
    typer.echo(f"the best: prunekit prune --recipe {output / 'best.yaml'} --output DIR")
    typer.echo(f"all trials: optuna-dashboard {storage or output / 'study.log'}")
