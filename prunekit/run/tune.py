"""Search over recipes: trials of one base recipe by Optuna, judged on the search text, kept in a study on disk.

A trial is what `prune` does, short of the test text and the export. What two trials have in common is not done
twice: the model is opened once, a calibration pass lies on a shelf by what determines it, a recipe is run once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from prunekit.data.draws import Draws
from prunekit.errors import CannotGoOn, WrongInput, first_line
from prunekit.plugins.registry import identify_code
from prunekit.recipe.choices import Choices
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.run import study as studies
from prunekit.run.bench import Bench
from prunekit.run.session import Job, open_session
from prunekit.run.study import OURS, SAMPLERS, FrozenTrial, Row, Sampler, TrialState, Tuned, optuna
from prunekit.run.workplace import claimed
from prunekit.system.files import Damaged, read_state, write_state
from prunekit.system.progress import Progress

Metric = Literal["perplexity", "loss", "objective", "parameters", "seconds"]
"""All are better when lower: of the small model on the search text, of the allocation, of its size, of the run."""

SHELF_BYTES = 20 << 30  # of candidates that are kept for later trials


def tune(
    recipe: Recipe,
    choices: Choices,
    job: Job,
    *,
    trials: int,
    metrics: Sequence[str] = ("perplexity",),
    sampler: Sampler = "tpe",
    storage: str | None = None,
    study_name: str | None = None,
    disk: int = SHELF_BYTES,
) -> Tuned:
    """Try recipes, those of earlier runs of the same study included, and write down the best.

    Trials are compared on the search text of the base recipe; the test text is not looked at. `output` holds the
    study (`study.log`, an Optuna journal, unless `storage` is a URL), `trials.json`, `best.yaml`,
    one `pareto-N.yaml` for each recipe of the front where there are several metrics, and up to `disk` bytes of
    candidates.

    Args:
        recipe: what is tuned.
        choices: what may be chosen.
        job: where the model comes from, the folder of the study, and whether an earlier one is continued or replaced.
        trials: number of recipes to try.
        metrics: all are better when lower; several make a front.
        sampler: the algorithm that proposes trials.
        storage: URL of an Optuna storage; None: a journal in the folder.
        study_name: in that storage; None: that of the folder.
        disk: bytes of candidates to keep.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
        CannotGoOn: no recipe was completed; gives the reason of the last.
    """
    output, keep = job.output, job.resume and not job.overwrite
    assert output is not None  # a study is on disk
    _check(metrics, choices, trials, study_name, sampler)
    if recipe.time is not None:
        raise WrongInput("a time is of one run, and a study tries many recipes; leave time away")
    most = choices.nodes.get("data.calibration_tokens")
    text = {"data.calibration_tokens": max(most.examples())} if most is not None else {}
    parts = resolve(recipe.with_overrides({"family": ()} | choices.fixed | text))  # trials are made one by one
    choices.check(parts.recipe)
    _check_pipes(parts.recipe, choices)
    session = open_session(parts, job)
    _check_text(session.draws, choices, metrics)
    session = session.with_prices(output if keep else None)
    session.warn_of_limit(session.make_spaces())  # can the budget be met, at these prices, and leaves it a search?
    base, ours = session.parts.recipe, session.identify()
    identity = ours | {
        "space": choices.source,
        "metrics": list(metrics),
        "sampler": sampler,
        "versions": ours["versions"] | {"optuna": optuna.__version__},
        **identify_code(base.model_dump(mode="json"), choices.source),
    }
    folder = claimed(
        output, identity, "a study",
        resume=job.resume, overwrite=job.overwrite, stays=studies.database_of(storage),
    )  # fmt: skip
    with session.work_in(folder) as (session, place), studies.silence_optuna():
        study = studies.open_study(place, storage, study_name or output.name, identity, len(metrics), keep)
        bench = Bench(session, place, disk)
        job.progress.describe(
            {**reporting.settings(base), "tune": {"metrics": list(metrics), "trials": trials, "sampler": sampler}}
        )
        rows = [_base_row(bench, metrics)]

        def found() -> Tuned:
            tuned = Tuned(study, base, [*rows, *studies.read_rows(study, metrics)], metrics)
            studies.write_found(tuned, place)
            return tuned

        tuned = found()
        _tell(job.progress, tuned, tuned.rows)
        with job.progress.stage("tune", trials) as stage:
            ended = min(trials, len(studies.read_rows(study, metrics)))
            stage.advance(ended, f"base: {studies.format_values(rows[0].values) or rows[0].reason}")
            for trial in studies.propose_trials(study, choices, trials, base.seed, place, sampler):
                _run(study, trial, bench, metrics)
                tuned = found()
                _tell(job.progress, tuned, tuned.rows[-1:])
                stage.advance(1, _standing(tuned, trial))
        if not any(row.values for row in tuned.rows):
            raise CannotGoOn(f"none of {len(tuned.rows)} recipes ended well; the last said: {tuned.rows[-1].reason}")
    return tuned


# -- running a recipe ---------------------------------------------------------------------------------


def _run(study: optuna.Study, trial: FrozenTrial, bench: Bench, metrics: Sequence[str]) -> None:
    """Judge a trial's recipe, or say what another trial of the same recipe said, and tell the study."""
    note: dict[str, Any] = dict(trial.user_attrs[OURS])
    state, values = TrialState.COMPLETE, list[float]()
    try:
        parts = resolve(bench.session.parts.recipe.with_overrides(note["overrides"]))
        note["recipe"] = parts.digest
        known = {
            row.recipe: row for row in [_base_row(bench, metrics), *studies.read_rows(study, metrics)] if row.recipe
        }
        if (same := known.get(parts.digest)) is not None:
            note |= {"same": same.name, "reason": same.reason}
            state, values = TrialState[same.state.upper()], [same.values[m] for m in metrics if same.values]
        else:
            values = list(bench.judge(parts, f"trial-{trial.number}", metrics).values())
            if not all(map(math.isfinite, values)):
                raise WrongInput(f"its metrics are not finite: {values}")
    except WrongInput as error:  # a sampler learns from what cannot be, not from what broke
        state, note["reason"] = TrialState.PRUNED, str(error)
    except (RuntimeError, ArithmeticError) as error:  # a plug-in's broken promise, memory, a factorisation
        state, note["reason"] = TrialState.FAIL, f"{type(error).__name__}: {first_line(error)}"
    study._storage.set_trial_user_attr(trial._trial_id, OURS, note)  # a trial taken over has no public way to note
    study.tell(trial.number, values if state == TrialState.COMPLETE else None, state=state)


def _base_row(bench: Bench, metrics: Sequence[str]) -> Row:
    """The base recipe, run once for a study: what every trial is compared with, and the first pass on the shelf."""
    file = bench.place / "base.json"
    try:
        found: dict[str, Any] = read_state(file)
    except Damaged as error:
        if file.exists():
            bench.session.progress.say(f"{error}; the base recipe is judged anew")
        try:
            found = {"state": "complete", "values": bench.judge(bench.session.parts, "base", metrics)}
        except (WrongInput, RuntimeError, ArithmeticError) as error:
            found = {"state": "fail", "values": {}, "reason": str(error)}
        write_state(file, found)
    return Row("base", overrides={}, recipe=bench.session.parts.digest, **found)


# -- checks and words ---------------------------------------------------------------------------------


def _check(metrics: Sequence[str], choices: Choices, trials: int, study_name: str | None, sampler: str) -> None:
    known = get_args(Metric)
    if sampler not in SAMPLERS:
        raise WrongInput(f"no sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    if unknown := [metric for metric in metrics if metric not in known]:
        raise WrongInput(f"no metric {unknown[0]!r}; there are {', '.join(known)}")
    if not metrics or len(set(metrics)) != len(metrics):
        raise WrongInput(f"give each metric once, at least one of {', '.join(known)}")
    if trials < 1:
        raise WrongInput(f"trials are counted from 1, not {trials}")
    if study_name == "":
        raise WrongInput("a study has a name; leave --study-name away, and it is that of the folder")
    if "objective" in metrics and any(key.split(".")[0] == "objective" for key in choices.open):
        raise WrongInput("the metric objective compares nothing where the objective is tuned; take --metric perplexity")


def _check_pipes(recipe: Recipe, choices: Choices) -> None:
    moved = [key for key in choices.open if key.split(".")[0] == "data"]
    if moved and (pipes := [name for name in recipe.data.names if Path(name).expanduser().is_fifo()]):
        raise WrongInput(
            f"{pipes[0]} is a named pipe, which can be read once, and where {moved[0]} is tuned it is read for many "
            "trials; save its text to a file"
        )


def _check_text(draws: Draws, choices: Choices, metrics: Sequence[str]) -> None:
    if draws.search.answers is not None and {"perplexity", "loss"} & set(metrics):
        raise WrongInput("questions have no perplexity; take --metric objective")
    streams = [
        {(text.dataset, text.split) for text in draws.spec.texts(key)} for key in ("dataset", "evaluation_dataset")
    ]
    moved = [key for key in ("data.dataset", "data.calibration_tokens") if key in choices.open]
    if moved and streams[0] & streams[1]:
        raise WrongInput(
            f"where {moved[0]} is tuned, evaluation needs a text of its own, or what is tuned on may be reported on; "
            "give data.evaluation_dataset"
        )


def _tell(progress: Progress, tuned: Tuned, rows: Sequence[Row]) -> None:
    """What came of recipes and the best so far, by trial; the base is number 0."""
    first, lowest = tuned.metrics[0], math.inf
    told = {row.name for row in rows}
    for row in tuned.rows:
        if row.values:
            lowest = min(lowest, row.values[first])
            if row.name in told:
                step = 0 if row.name == "base" else int(row.name) + 1
                progress.measured({f"trial/{name}": value for name, value in row.values.items()}, step)
                progress.measured({f"trial/best_{first}": lowest}, step)


def _standing(tuned: Tuned, trial: FrozenTrial) -> str:
    row = next(row for row in tuned.rows if row.name == str(trial.number))
    said = studies.format_values(row.values) or f"{row.state}, {row.reason}"
    best = next(iter(tuned.front), None) if any(r.values for r in tuned.rows) else None
    return f"trial {row.name}: {said}" + (f"; best {studies.format_values(best.values)} of {best.name}" if best else "")
