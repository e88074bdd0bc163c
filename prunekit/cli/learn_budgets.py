"""`prunekit learn-budgets`: an allocator learns from searches to answer any budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.completion import RECIPES, one_of
from prunekit.cli.options import Work, check_words, needed_model, option, parse_shares, works
from prunekit.cli.quiet import quiet_libraries
from prunekit.errors import WrongInput

RECIPE = "Recipe whose allocator learns: preset, YAML file, or folder of a pruned model."
SHARES = "Shares of the blocks' parameters to remove that are searched, by comma."


@works("what is learnt")
def learn_budgets(
    work: Work,
    *,
    recipe: Annotated[str, option(RECIPE, autocompletion=one_of(RECIPES))] = "lop",
    sparsity: Annotated[
        str, option(SHARES, None, metavar="SHARES")
    ] = "0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.55,0.6,0.65,0.7",
) -> dict[str, Any]:
    """Search several budgets of a model once, and learn to answer any other without a search."""
    from prunekit.recipe.schema import Recipe

    overrides = work.overrides()
    base = Recipe.load(recipe, trust_remote_code="trust_remote_code" in overrides)
    chosen = base.spread(overrides | {"sparsity": parse_shares(sparsity)})
    if chosen is None:
        raise WrongInput("one budget is nothing to learn from; give several by comma: --sparsity 0.2,0.4,0.6")
    check_words(chosen)
    needed_model(chosen.model, "prunekit learn-budgets MODEL --output DIR")
    work.place("what is learnt")

    from prunekit.run import learn_budgets as learning

    quiet_libraries()
    with work.job(announce=True) as job:
        found = learning.learn_budgets(chosen, job)
    assert chosen.allocator is not None  # else nothing was learnt
    name = chosen.allocator["name"]
    typer.echo(any_budget(name, found))
    return {"output": found}


def any_budget(name: str, learnt: Path) -> str:
    """Say how to prune with what an allocator has learnt."""
    return f"any budget: prunekit prune MODEL --allocator {name} --set allocator.model={learnt} --output DIR"
