"""`prunekit tune`: a search for a better recipe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prunekit.cli.completion import RECIPES, SPACES, one_of
from prunekit.cli.options import RUN, SEARCH, Work, check_words, needed_model, option, works
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import print_table, recipes
from prunekit.errors import without_secrets

RECIPE = "Recipe to improve: preset, YAML file, or folder of a pruned model."
METRIC = (
    "What to minimise: perplexity (if none is given), loss, objective, parameters or seconds. Repeatable; several give "
    "a Pareto front."
)
STORAGE = "Optuna storage, e.g. sqlite:///my.db; otherwise study.log in the folder."
SAMPLERS = ("tpe", "nsga-ii", "nsga-iii")
DISK = "Disk space for candidates that later trials reuse."


@works("the study", "study")
def tune(
    work: Work,
    *,
    recipe: Annotated[str, option(RECIPE, autocompletion=one_of(RECIPES))] = "default",
    sparsity: Annotated[float | None, option("Share of the blocks' parameters to remove.", metavar="SHARE")] = None,
    space: Annotated[
        str, option("Choices to search: preset or YAML file.", SEARCH, autocompletion=one_of(SPACES))
    ] = "default",
    trials: Annotated[int, option("Number of recipes to try, earlier runs included.", SEARCH, metavar="N", min=1)] = 50,
    metric: Annotated[list[str] | None, option(METRIC, SEARCH)] = None,
    sampler: Annotated[
        str, option("tpe, nsga-ii or nsga-iii.", SEARCH, autocompletion=one_of(lambda: SAMPLERS))
    ] = "tpe",
    storage: Annotated[str | None, option(STORAGE, RUN, metavar="URL")] = None,
    study_name: Annotated[str | None, option("Name in that storage; otherwise that of the folder.", RUN)] = None,
    disk: Annotated[float, option(DISK, RUN, metavar="GB", min=0)] = 20,
) -> dict[str, Any]:
    """Search for a better recipe. Trials are compared on the search text, never on the test text."""
    from prunekit.recipe.choices import Choices
    from prunekit.recipe.schema import Recipe

    overrides = work.overrides(sparsity=sparsity)
    chosen = Recipe.load(recipe, trust_remote_code="trust_remote_code" in overrides).with_overrides(overrides)
    choices = Choices.load(space)
    check_words(chosen)
    needed_model(chosen.model, "prunekit tune MODEL --output DIR")
    output = work.place("the study")

    from prunekit.run import tune as tuning

    quiet_libraries()
    with work.job() as job:
        tuned = tuning.tune(
            chosen,
            choices,
            job,
            trials=trials,
            metrics=[name for text in metric or ["perplexity"] for name in text.split(",")],
            sampler=sampler,  # type: ignore[arg-type]  # checked there
            storage=storage,
            study_name=study_name,
            disk=round(disk * 1e9),
        )
    print_table(recipes([vars(row) for row in tuned.rows], tuned.metrics, {row.name for row in tuned.front}))
    typer.echo(f"the best: prunekit prune --recipe {output / 'best.yaml'} --output DIR")
    typer.echo(f"all trials: optuna-dashboard {without_secrets(storage or str(output / 'study.log'))}")
    front = [{"trial": row.name, "values": row.values} for row in tuned.front]
    return {"output": output, "recipe": output / "best.yaml", "front": front}
