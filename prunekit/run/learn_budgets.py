"""Searches under several budgets over one model, and what an allocator learns from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from prunekit.errors import WrongInput
from prunekit.plugins.allocator import Allocator, Searched
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.prune import open_runs
from prunekit.run.results import clear_result
from prunekit.run.search import run_search
from prunekit.run.session import Job
from prunekit.run.stages import Run
from prunekit.run.workplace import publish, published
from prunekit.space.sites import Allocation
from prunekit.system.files import write_json

FILE = "searches.json"  # what it was learnt from


def learn_budgets(recipe: Recipe, job: Job) -> Path:
    """Search every budget of a recipe's family, and let its allocator learn to answer others.

    An interrupted run goes on where it was: what was judged is on record.

    Args:
        recipe: names its family, and an allocator that learns.
        job: where the model comes from and the folder goes.

    Returns:
        The folder, which the allocator's option names.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
    """
    output, asked = job.output, [member.sparsity for member in recipe.members]
    if output is None:
        raise WrongInput("what is learnt needs a folder; give output")
    if recipe.allocator is None:
        raise WrongInput("an allocator learns from its searches, and the recipe has a learner; give an allocator")
    allocator = resolve(recipe).allocator
    if type(allocator).learn is Allocator.learn:
        allocator.learn((), output)
    with open_runs(recipe, job, asked) as (place, runs):
        if published(place, output.resolve()):
            return output
        run_search(runs)
        done = place / "result"
        clear_result(done, runs[0].parts.exporters)
        done.mkdir()
        learn_from(runs, allocator, done)
        publish(done, output, overwrite=job.overwrite)
    return output


def learns(recipe: Recipe, allocator: Allocator) -> bool:
    """Whether an allocator can learn from the searches of a recipe's family."""
    return recipe.allocator is not None and type(allocator).learn is not Allocator.learn and allocator.asks


def learn_from(runs: Sequence[Run], allocator: Allocator, folder: Path) -> None:
    """Let an allocator learn from searches that are over.

    Args:
        runs: one for every budget, after its search.
        allocator: of all of them.
        folder: an empty one, for what is learnt and for what it was learnt from.

    Raises:
        WrongInput: it cannot learn from these.
    """
    searches = [searched(run) for run in sorted(runs, key=lambda run: run.whole.budget.limit)]
    first = runs[0].parts.recipe
    with runs[0].progress.stage("learning", 0):
        allocator.learn(searches, folder)
    for each in searches:
        runs[0].progress.measured({"searched/best": each.judged[0][1]}, each.whole.budget.limit)
    write_json(folder / FILE, {
        "model": first.model,
        "allocator": first.allocator,
        "sparsity": sorted(run.parts.recipe.sparsity for run in runs),
        "token_forwards": sum(run.ledger.tokens + run.ledger.trained for run in runs),
        "best": [{"limit": each.whole.budget.limit, "loss": each.judged[0][1]} for each in searches],
    })  # fmt: skip


def searched(run: Run) -> Searched:
    """What the ledger of a run has on the most tokens, the best first."""
    records = [json.loads(line) for line in run.ledger.text().splitlines()]
    found = [
        (tuple(record["allocation"]), record["loss"], record["tokens"])
        for record in records
        if record["kind"] == "question" and record["loss"] is not None
    ]
    able = [item for item in found if run.whole.is_feasible(item[0])]
    if not able:
        raise WrongInput("no allocation was judged, so that there is nothing to learn; take an allocator that asks")
    # few are judged on all tokens: the others follow, on fewer and fewer
    ranked = sorted(able, key=lambda item: (-item[2], item[1]))
    most: dict[Allocation, tuple[float, int]] = {}
    for allocation, loss, tokens in ranked:
        most.setdefault(allocation, (loss, tokens))
    judged = tuple((allocation, loss) for allocation, (loss, _) in most.items())
    problem = run.problems[-1] if run.problems else None
    return Searched(run.whole, judged, tuple(tokens for _, tokens in most.values()), problem)
