"""The whole flow on one screen: tokens → moments → candidates → table → questions → allocation → small model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from prunekit.measure.perplexity import Perplexity, perplexity
from prunekit.measure.samples import side_by_side
from prunekit.models import paging
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.report.page import add_page
from prunekit.run.finish import finish_model
from prunekit.run.results import Result, clear_result, load_small, make_export, write_result
from prunekit.run.search import run_search
from prunekit.run.session import Job, open_session
from prunekit.run.stages import Run, assemble
from prunekit.run.workplace import check_output, left, publish, published, unfinished, workplace
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation


def prune(recipe: Recipe, job: Job) -> Result:
    """Prune after a recipe. One that names its family is searched together with all of it, to come out as it did there.

    Args:
        recipe: every choice that makes the model.
        job: where the model comes from and the result goes.

    Returns:
        The pruned model and its report.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
        PluginError: a plug-in broke its contract.
        CannotGoOn: what was written is not the same model when it is loaded.
    """
    output = job.output
    with open_runs(recipe, job) as (place, runs):
        if output is not None and published(place, output.resolve()):  # it was stopped while it tidied up
            blocks, trusted = runs[0].dense.shares.blocks, recipe.trust_remote_code
            return Result.load(output, blocks=blocks, trust_remote_code=trusted)
        run = next(run for run in runs if run.parts.recipe.sparsity == recipe.sparsity)
        clear_result(place / "result", run.parts.exporters)
        found = dict(zip(runs, run_search(runs), strict=True))
        result = make_result(run, *found[run], run.measure_dense(), output)
        if output is not None:
            write_result(result, place / "result", run.progress.say)
            if job.page:
                add_page(place / "result", run.progress.say)
            publish(place / "result", output, overwrite=job.overwrite)
            for exporter in run.parts.exporters:
                if (where := exporter.deliver(output)) is not None:
                    run.progress.say(f"uploaded to {where}")
    if output is not None and paging.pager_of(result.model) is not None:  # what it was cut from is gone
        model = load_small(output, result.blocks, trust_remote_code=recipe.trust_remote_code)
        return replace(result, model=model)
    return result


@contextmanager
def open_runs(recipe: Recipe, job: Job, asked: Sequence[float] | None = None) -> Iterator[tuple[Path, list[Run]]]:
    """Open a folder to work in, and a run for the recipe or for every one of its family.

    `asked` are the sparsities that a family makes results of; None: of the recipe's own, and no family is made.
    """
    parts, output = resolve(recipe), job.output
    if output is not None:
        files = [*recipe.data.names, *([recipe.model] if job.model is None and recipe.model else [])]
        check_output(output, overwrite=job.overwrite, sources=[f for f in files if Path(f).exists()])
    earlier = output if job.resume else None
    if earlier is None or not unfinished(earlier):  # a run that is continued may have all it needs on record
        parts.allocator.ready()
    session = open_session(parts, job, asked)
    identity = session.identify() | ({} if asked is None else {"sparsity": list(asked)})
    session = session.with_prices(None if earlier is None else left(earlier, identity))
    spaces = session.make_spaces()
    session.warn_of_limit(spaces)
    with session.work_in(workplace(output, identity, resume=job.resume, overwrite=job.overwrite)) as (session, place):
        session.progress.describe(reporting.settings(session.parts.recipe))
        yield place, session.start_runs(session.parts, spaces, session.draws, place, place, session.clock)


def make_result(run: Run, net: Supernet, answer: Allocation, before: Perplexity, output: Path | None) -> Result:
    """Make the small model of an answer: rebuilt, finished, measured, and packed as it will be exported."""
    evaluation = run.draws.evaluation
    net, plan = run.rebuild(net, answer)
    with run.clock("evaluate"):
        judged = run.final_loss(net, plan)
    net.rest()  # what was cut out to be judged and what is assembled are not held together
    small = assemble(net, plan, run.parts)
    with run.clock("evaluate"):
        raw = perplexity(small, evaluation) if run.parts.finishers else None
    written = run.samples(run.original.model)
    said = finish_model(run, small, net, plan)
    with run.clock("evaluate"):
        after = perplexity(small, evaluation)
        rise, error = after.above(before)
        losses = {
            "objective": judged,
            "dense": before.as_dict(),
            "pruned": after.as_dict(),
            "rise": {"nll": rise, "standard_error": error},  # paired by window
            "nll_by_source": reporting.by_source(evaluation, before, after),
        } | ({} if raw is None else {"unfinished": raw.as_dict()})
    texts = side_by_side(written, run.samples(small))
    pace = run.time_result(small, plan)
    exported, probe, record = make_export(run, net, plan, small, stays=output is None)
    document = reporting.report(
        run.parts, run.original, run.draws, run.whole, net, plan, exported, losses=losses, finishers=said, pace=pace,
        samples=texts, learned=run.learned, shares=run.shares, share=run.share,
        search=reporting.searched(run.ledger),
        seconds=run.clock.seconds, seconds_shared=run.clock.shared.own,
    )  # fmt: skip
    front = f"{run.parts.recipe.sparsity}/" if run.parts.recipe.family else ""
    run.progress.measured(reporting.headline(document, front))
    blocks, recipe = run.blocks(reporting.count(exported)), run.timeless(said)
    return Result(exported, run.dense.tokenizer, recipe, document, run.ledger.text(), output, probe, blocks, record)
