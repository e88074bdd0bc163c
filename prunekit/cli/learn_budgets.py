"""`prunekit learn-budgets`: an allocator learns from searches to answer any budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.completion import RECIPES, one_of
from prunekit.cli.options import (
    RUN,
    Dataset,
    JsonLines,
    Model,
    ModelOption,
    Quiet,
    Set,
    Trust,
    allowed,
    check_words,
    given_model,
    needed_model,
    option,
    parse_shares,
    split_datasets,
    switch,
)
from prunekit.cli.quiet import quiet_libraries
from prunekit.errors import WrongInput

RECIPE = "Recipe whose allocator learns: preset, YAML file, or folder of a pruned model."
SHARES = "Shares of the blocks' parameters to remove that are searched, by comma."


def learn_budgets(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    output: Annotated[Path | None, switch("Folder for what is learnt.", None, "--output", "-o")] = None,
    recipe: Annotated[str, option(RECIPE, autocompletion=one_of(RECIPES))] = "lop",
    sparsity: Annotated[
        str, option(SHARES, None, metavar="SHARES")
    ] = "0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.55,0.6,0.65,0.7",
    set_: Set = None,
    trust_remote_code: Trust = False,
    dataset: Dataset = None,
    resume: Annotated[bool, switch("Continuation of an interrupted run.", RUN)] = True,
    overwrite: Annotated[bool, switch("Replacement of an earlier folder.", RUN, "--overwrite")] = False,
    quiet: Quiet = False,
    json_lines: JsonLines = None,
) -> dict[str, Any]:
    """Search several budgets of a model once, and learn to answer any other without a search."""
    from prunekit.recipe.overrides import parsed
    from prunekit.recipe.schema import Recipe

    flags = {"model": given_model(model, model_option), "data.dataset": split_datasets(dataset)}
    given = {key: value for key, value in flags.items() if value is not None}
    overrides = given | allowed(trust_remote_code) | dict(map(parsed, set_ or []))
    base = Recipe.load(recipe, trust_remote_code="trust_remote_code" in overrides)
    chosen = base.spread(overrides | {"sparsity": parse_shares(sparsity)})
    if chosen is None:
        raise WrongInput("one budget is nothing to learn from; give several by comma: --sparsity 0.2,0.4,0.6")
    check_words(chosen)
    needed_model(chosen.model, "prunekit learn-budgets MODEL --output DIR")
    if output is None:
        raise WrongInput("no --output was given; name a new folder for what is learnt")

    from prunekit.run import learn_budgets as learning
    from prunekit.run.session import Job
    from prunekit.system.progress import progress_for

    quiet_libraries()
    job = Job(output=output, progress=progress_for(quiet), resume=resume, overwrite=overwrite, announce=True)
    found = learning.learn_budgets(chosen, job)
    assert chosen.allocator is not None  # else nothing was learnt
    name = chosen.allocator["name"]
    typer.echo(any_budget(name, found))
    return {"output": found}


def any_budget(name: str, learnt: Path) -> str:
    """Say how to prune with what an allocator has learnt."""
    return f"any budget: prunekit prune MODEL --allocator {name} --set allocator.model={learnt} --output DIR"
