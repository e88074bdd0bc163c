"""The whole flow on one screen: tokens → moments → candidates → table → questions → allocation → small model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prunekit.measure.perplexity import Perplexity, perplexity
from prunekit.models import paging
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.run.finish import finish_model
from prunekit.run.results import Result, load_small, pack_result, write_result
from prunekit.run.session import open_session
from prunekit.run.stages import Run, assemble, clear_folder
from prunekit.run.workplace import check_output, left, publish, published, unfinished, workplace
from prunekit.search.conversation import Known
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.system.progress import Progress


def prune(
    recipe: Recipe,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    output: Path | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> Result:
    """Prune after a recipe. One that names its family is searched together with all of it, to come out as it did there.

    Args:
        recipe: says everything but what follows.
        model: in memory, with its tokenizer; None: the recipe names one.
        tokenizer: of a model in memory.
        output: folder of the result; None: it stays in memory.
        progress: what the user is told; None: nothing.
        resume: whether to go on with an interrupted run of the same recipe.
        overwrite: whether a result in `output` may be replaced.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
        PluginError: a plug-in broke its contract.
        CannotGoOn: what was written is not the same model when it is loaded.
    """
    with open_runs(recipe, model, tokenizer, output, progress, resume=resume, overwrite=overwrite) as (place, runs):
        if output is not None and published(place, output.resolve()):  # it was stopped while it tidied up
            return Result.load(output, blocks=runs[0].dense.shares.blocks)
        found = dict(zip(runs, run_search(runs), strict=True))
        run = next(run for run in runs if run.parts.recipe.sparsity == recipe.sparsity)
        result = make_result(run, *found[run], run.measure_dense(), output)
        if output is not None:
            write_result(result, clear_folder(place / "result"))
            publish(place / "result", output)
    if output is not None and paging.pager_of(result.model) is not None:  # what it was cut from is gone
        return replace(result, model=load_small(output, result.recipe, result.blocks))
    return result


@contextmanager
def open_runs(
    recipe: Recipe,
    model: PreTrainedModel | None,
    tokenizer: Any,
    output: Path | None,
    progress: Progress | None,
    asked: Sequence[float] | None = None,
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[tuple[Path, list[Run]]]:
    """Open a folder to work in, and a run for the recipe or for every one of its family.

    `asked` are the sparsities that a family makes results of; None: of the recipe's own, and no family is made.
    """
    parts = resolve(recipe)
    if output is not None:
        files = [*recipe.data.names, *([recipe.model] if model is None and recipe.model else [])]
        check_output(output, overwrite=overwrite, sources=[f for f in files if Path(f).exists()])
    if not (resume and output is not None and unfinished(output)):  # what goes on may have all it needs on record
        parts.allocator.ready()
    session = open_session(parts, model, tokenizer, output, progress or Progress(), asked)
    identity = session.identify() | ({} if asked is None else {"sparsity": list(asked)})
    session = session.with_prices(left(output, identity) if resume and output is not None else None)
    spaces = session.make_spaces()
    with session.work_in(workplace(output, identity, resume=resume, overwrite=overwrite)) as (session, place):
        yield place, session.start_runs(session.parts, spaces, session.draws, place, place, session.clock)


def run_search(runs: Sequence[Run]) -> list[tuple[Supernet, Allocation]]:
    """Search each run's allocation: coarse to fine, as long as its allocator wants finer ladders.

    The runs differ in their budgets alone: a calibration pass along the rungs of all costs little more than along those
    of one, so every round has one; then each holds its own conversation on its own ladders, and what is known from
    another's is not judged again.

    Returns:
        For every run, the network that its last conversation was about, and the answer.
    """
    first, number, found = runs[0], 0, dict[Run, tuple[Supernet, Allocation]]()
    allocator = first.parts.allocator
    spaces = {run: allocator.first_space(run.whole) for run in runs}  # of those that still search
    centres = {run: run.whole.uniform() for run in runs}
    while spaces:
        starts = {run: space.nearest(centres[run]) for run, space in spaces.items()}
        every = next(iter(spaces.values())).joined(*spaces.values())
        middle = tuple(sorted(counts)[len(counts) // 2] for counts in zip(*starts.values(), strict=True))
        net = first.calibrate(every, middle, f"prune {number + 1}", first.clock.shared, search=True)
        known: Known = {}
        centres = {run: run.ask_allocator(net, spaces[run], starts[run], number, known) for run in spaces}
        finer = {run: allocator.next_space(space, centres[run]) for run, space in spaces.items()}
        found |= {run: (net, centres[run]) for run, space in finer.items() if space is None}
        spaces = {run: space for run, space in finer.items() if space is not None}
        number += 1
        net.rest()  # the next pass needs the room
    return [found[run] for run in runs]


def make_result(run: Run, net: Supernet, answer: Allocation, before: Perplexity, output: Path | None) -> Result:
    """Make the small model of an answer: rebuilt, finished, measured, and packed as it will be exported."""
    evaluation = run.draws.evaluation
    net, plan = run.rebuild(net, answer)
    small = assemble(net, plan, run.parts)
    raw = perplexity(small, evaluation) if run.parts.finishers else None
    said = finish_model(run, small, net, plan)
    with run.clock("evaluate"):
        after = perplexity(small, evaluation)
        rise, error = after.above(before)
        losses = {
            "objective": run.parts.objective.loss(net, plan, run.draws.search),
            "dense": before.as_dict(),
            "pruned": after.as_dict(),
            "rise": {"nll": rise, "standard_error": error},  # paired by window
            "nll_by_source": reporting.by_source(evaluation, before, after),
        } | ({} if raw is None else {"unfinished": raw.as_dict()})
    pace = run.time_result(small, plan)
    return pack_result(run, net, plan, small, losses=losses, finishers=said, pace=pace, output=output)
