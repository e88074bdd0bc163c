"""Search over recipes: trials of one base recipe by Optuna, judged on the search text, kept in a study on disk.

A trial is what `prune` does, short of the test text and the export. What two trials have in common is not done
twice: the model is opened once, a walk lies on a shelf by what determines it, a recipe is run once.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args
from warnings import catch_warnings, simplefilter

from transformers import PreTrainedModel

from prunekit.data.draws import Draws, draw
from prunekit.data.tokens import overlap
from prunekit.errors import CannotGoOn, WrongInput
from prunekit.measure.perplexity import perplexity
from prunekit.models.opening import limits, opened, skeleton
from prunekit.plugins.dense import Dense
from prunekit.plugins.engine import Opening, Team
from prunekit.plugins.registry import ENGINES, OBJECTIVES
from prunekit.recipe.choices import Choices
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.run.pipeline import (
    Clock,
    Run,
    assembled,
    devices_of,
    emptied,
    foreseen,
    priced,
    searched,
    whole_space,
    write_prices,
)
from prunekit.run.workplace import claimed
from prunekit.search.ledger import Ledger
from prunekit.search.teacher import Teacher
from prunekit.space.prices import FILE
from prunekit.system.files import write_json
from prunekit.system.progress import Progress, span

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise ImportError("prunekit tune needs optuna, which is not installed: pip install 'prunekit[optuna]'") from error

Metric = Literal["perplexity", "loss", "objective", "parameters", "seconds"]
"""All are better when lower: of the small model on the search text, of the allocation, of its size, of the run."""

Sampler = Literal["tpe", "nsga-ii", "nsga-iii"]
"""Optuna's, who proposes trials; an NSGA draws its first 50 at random and breeds generations of 50 from then on."""

SHELF_BYTES = 20 << 30  # of candidates that are kept for later trials
SAMPLERS: Mapping[Sampler, Callable[[int], optuna.samplers.BaseSampler]] = {  # by seed; what else they know is kept
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
    "nsga-ii": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga-iii": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
}
OURS = "prunekit"  # key of what a trial notes of itself
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Row:
    """What came of one recipe."""

    name: str  # "base", or the number of the trial
    state: str  # complete; pruned: no such recipe can be; fail: it broke
    overrides: Mapping[str, Any]  # of the base recipe
    values: Mapping[str, float]  # by metric; empty where it did not end well
    reason: str = ""
    recipe: str = ""  # digest


@dataclass(frozen=True, eq=False)
class Tuned:
    """A study and what it found."""

    study: optuna.Study
    base: Recipe  # with its text resolved and what the space fixes
    rows: Sequence[Row]  # the base first, then the trials
    metrics: Sequence[str]

    @cached_property
    def front(self) -> list[Row]:
        """The rows that no other row beats, best first in the first metric; one for one metric."""
        done = list({row.recipe: row for row in reversed(self.rows) if row.values}.values())[::-1]
        points = {row.name: tuple(row.values[m] for m in self.metrics) for row in done}

        def beaten(row: Row) -> bool:
            mine = points[row.name]
            return any(other != mine and all(map(float.__le__, other, mine)) for other in points.values())

        front = sorted((row for row in done if not beaten(row)), key=lambda row: points[row.name])
        return front if len(self.metrics) > 1 else front[:1]

    @property
    def best(self) -> Recipe:
        """The recipe that is best in the first metric."""
        return self.recipe(self.front[0])

    def recipe(self, row: Row) -> Recipe:
        """The recipe of a row, complete."""
        return self.base.with_overrides(row.overrides).checked()


def tune(
    recipe: Recipe,
    choices: Choices,
    *,
    trials: int,
    output: Path,
    metrics: Sequence[str] = ("perplexity",),
    sampler: Sampler = "tpe",
    storage: str | None = None,
    study_name: str | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    resume: bool = True,
    overwrite: bool = False,
    disk: int = SHELF_BYTES,
) -> Tuned:
    """Try `trials` recipes, those of earlier runs of the same study included, and write down the best.

    Trials are compared on the search text of the base recipe; the test text is not looked at. `output` holds the
    study (`study.log`, an Optuna journal, unless `storage` is a URL), `best.yaml`, one `pareto-N.yaml` for each recipe
    of the front where there are several metrics, and up to `disk` bytes of candidates.

    Raises:
        WrongInput: says what was asked, what there is and what to do.
        CannotGoOn: not one trial ended well; says what the last said.
    """
    progress = progress or Progress()
    _check(metrics, choices, trials, study_name, sampler)
    most = choices.nodes.get("data.calibration_tokens")
    text = {"data.calibration_tokens": max(most.examples())} if most is not None else {}
    base = recipe.with_overrides({"family": ()} | choices.fixed | text).checked()  # trials are made one by one
    choices.check(base)
    source = base.model if model is None else model
    if source is None:
        raise WrongInput("no model was given; name a folder or a hub id, or pass a model in memory")
    plan = foreseen(base, *skeleton(source, trust_remote_code=base.trust_remote_code), output)
    plan.check()
    devices = devices_of(base, plan)
    dense = opened(
        source, tokenizer,
        device=str(devices[0]), dtype=base.dtype, trust_remote_code=base.trust_remote_code, shares=plan.shares,
    )  # fmt: skip
    base = priced(base, dense, output / FILE if resume and not overwrite else None, progress)
    whole_space(base, dense.model, dense.adapter, dense.dtype)  # can the budget be met, at these prices?
    draws = draw(dense.tokenizer, base.data, progress, seed=base.seed, **limits(dense.model))
    base = base.completed(model=dense.name, draws=draws)
    _check_text(base, choices, draws, metrics)
    identity = {
        **base.determining(),
        "space": choices.source,
        "metrics": list(metrics),
        "sampler": sampler,
        "weights": dense.fingerprint,
        "versions": reporting.versions(base) | {"optuna": optuna.__version__},
    }
    engine, opening = ENGINES.build(base.engine), Opening(source, base.dtype, base.trust_remote_code)
    with (
        claimed(output, identity, "a study", resume=resume, overwrite=overwrite) as place,
        engine.team(dense, opening, devices) as team,
        _quiet(),
    ):
        write_prices(base, place)  # beside the recipes that name it
        study = _study(place, storage, study_name or output.name, identity, len(metrics), resume and not overwrite)
        bench = Bench(base, dense, draws, place, tuple(metrics), progress, disk, team)
        rows = [_base_row(bench)]
        _note(Tuned(study, base, [*rows, *_rows(study, metrics)], metrics), place)
        with progress.stage("tune", trials) as stage:
            stage.advance(min(trials, len(_rows(study, metrics))), f"base: {_values(rows[0].values) or rows[0].reason}")
            for trial, overrides in _asked(study, choices, trials, base.seed, place, sampler, ours=storage is None):
                _run(study, trial, overrides, bench)
                tuned = Tuned(study, base, [*rows, *_rows(study, metrics)], metrics)
                _note(tuned, place)
                stage.advance(1, _standing(tuned, trial))
        tuned = Tuned(study, base, [*rows, *_rows(study, metrics)], metrics)
        if not any(row.values for row in tuned.rows):
            raise CannotGoOn(f"none of {len(tuned.rows)} recipes ended well; the last said: {tuned.rows[-1].reason}")
    return tuned


# -- running a recipe ---------------------------------------------------------------------------------


@dataclass(eq=False)
class Bench:
    """One model, one text to be compared on, and a shelf of walks."""

    base: Recipe
    dense: Dense
    draws: Draws
    place: Path
    metrics: tuple[str, ...]
    progress: Progress
    disk: int
    team: Team | None = None

    def judged(self, recipe: Recipe) -> dict[str, float]:
        """The recipe's metrics.

        Raises:
            WrongInput: there can be no such recipe.
        """
        clock, shelf = Clock(), self.place / "walks"
        folder = self.place / f"trial-{recipe.digest[:16]}"
        for path in (shelf, folder):
            path.mkdir(exist_ok=True)
        whole, draws = whole_space(recipe, self.dense.model, self.dense.adapter, self.dense.dtype), self._drawn(recipe)
        OBJECTIVES.build(recipe.objective).check(draws.search)
        ledger = Ledger(folder / "ledger.jsonl")
        teacher = Teacher(self.dense.shares, emptied(folder / "teacher"))
        run = Run(
            recipe, self.dense, whole, draws, ledger, folder, self.progress, clock, teacher, shelf, team=self.team,
        )  # fmt: skip
        net, plan = run.rebuilt(*searched([run])[0])
        small = assembled(net, plan, recipe)
        run.finish(small, net, plan)
        kept = reporting.count(small)
        if not all(site.form.shrinks for site in net.space.sites):
            single = reporting.weights(small, net, plan, recipe.structure)
            kept -= single["in_linear_maps"] - single["not_zero"]
        found: dict[str, float] = {"parameters": kept, "seconds": sum(clock.seconds.values())}
        if {"perplexity", "loss"} & set(self.metrics):
            measured = perplexity(small, draws.search, progress=self.progress)
            found |= {"perplexity": measured.value, "loss": measured.nll}
        if "objective" in self.metrics:
            found["objective"] = OBJECTIVES.build(recipe.objective).loss(net, plan, draws.search)
        shutil.rmtree(folder)
        self._tidy(shelf)
        return {metric: float(found[metric]) for metric in self.metrics}

    def _drawn(self, recipe: Recipe) -> Draws:
        """The recipe's calibration tokens; what judges is the same for all."""
        if recipe.data == self.base.data:
            return self.draws
        draws = draw(self.dense.tokenizer, recipe.data, self.progress, seed=recipe.seed, **limits(self.dense.model))
        if overlap(draws.calibration, self.draws.search):
            raise WrongInput("it calibrates on text that trials are compared on; give data.search_dataset")
        return replace(draws, search=self.draws.search)

    def _tidy(self, shelf: Path) -> None:
        """Let go the walks that were not used for the longest time, until the rest fits."""
        walks = sorted(shelf.iterdir(), key=lambda walk: walk.stat().st_mtime)
        sizes = [sum(file.stat().st_size for file in walk.iterdir()) for walk in walks]
        total = sum(sizes)
        for walk, size in zip(walks, sizes, strict=True):
            if total <= self.disk:
                break
            shutil.rmtree(walk)
            total -= size


def _run(study: optuna.Study, trial: FrozenTrial, overrides: Mapping[str, Any], bench: Bench) -> None:
    """Judge a trial's recipe, or say what another trial of the same recipe said, and tell the study."""
    note: dict[str, Any] = {"overrides": dict(overrides)}
    state, values = TrialState.COMPLETE, list[float]()
    try:
        recipe = bench.base.with_overrides(overrides).checked()
        note["recipe"] = recipe.digest
        told = {row.recipe: row for row in [_base_row(bench), *_rows(study, bench.metrics)] if row.recipe}
        if (same := told.get(recipe.digest)) is not None:
            note |= {"same": same.name, "reason": same.reason}
            state, values = TrialState[same.state.upper()], [same.values[m] for m in bench.metrics if same.values]
        else:
            values = list(bench.judged(recipe).values())
            if not all(map(math.isfinite, values)):
                raise WrongInput(f"its metrics are not finite: {values}")
    except WrongInput as error:  # a sampler learns from what cannot be, not from what broke
        state, note["reason"] = TrialState.PRUNED, str(error)
    except (RuntimeError, ArithmeticError) as error:  # a plug-in's broken promise, memory, a factorisation
        state, note["reason"] = TrialState.FAIL, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    study._storage.set_trial_user_attr(trial._trial_id, OURS, note)  # a trial taken over has no public way to note
    study.tell(trial.number, values if state == TrialState.COMPLETE else None, state=state)


def _base_row(bench: Bench) -> Row:
    """The base recipe, run once for a study: what every trial is compared with, and the first walk on the shelf."""
    file = bench.place / "base.json"
    if not file.exists():
        try:
            found: dict[str, Any] = {"state": "complete", "values": bench.judged(bench.base)}
        except (WrongInput, RuntimeError, ArithmeticError) as error:
            found = {"state": "fail", "values": {}, "reason": str(error)}
        write_json(file, found)
    return Row("base", overrides={}, recipe=bench.base.digest, **json.loads(file.read_text()))


# -- the study ----------------------------------------------------------------------------------------


def _study(
    place: Path, storage: str | None, name: str, identity: Mapping[str, Any], directions: int, keep: bool
) -> optuna.Study:
    """The study of this identity, begun where there is none.

    Raises:
        WrongInput: the storage cannot be opened, or holds another study of that name.
    """
    mine = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    try:
        where: Any = storage
        if storage is None:
            where = optuna.storages.JournalStorage(JournalFileBackend(str(place / "study.log")))
        elif not keep and name in optuna.get_all_study_names(where):
            optuna.delete_study(study_name=name, storage=where)
        minimized = [optuna.study.StudyDirection.MINIMIZE] * directions
        study = optuna.create_study(storage=where, study_name=name, directions=minimized, load_if_exists=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise WrongInput(f"the storage {storage!r} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # SQLAlchemy's own, which is not imported for this
        if type(error).__module__.split(".")[0] not in ("sqlalchemy", "optuna"):
            raise
        raise WrongInput(f"the storage {storage!r} cannot be opened: {str(error).strip().splitlines()[0]}") from error
    if study.user_attrs.setdefault(OURS, mine) != mine:
        raise WrongInput(f"{storage} holds another study called {name!r}; choose another --study-name, or --overwrite")
    study.set_user_attr(OURS, mine)
    return study


def _asked(
    study: optuna.Study, choices: Choices, trials: int, seed: int, place: Path, sampler: Sampler, *, ours: bool
) -> Iterator[tuple[FrozenTrial, Mapping[str, Any]]]:
    """Trials to run: first those that an earlier run of this folder has left unfinished.

    The sampler of a trial is seeded by the trial's number, so that a study that was interrupted goes on as if
    it had not been.
    """
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        left = trial.user_attrs.get(OURS)
        if left is not None and left["place"] == str(place.resolve()):
            yield trial, left["overrides"]
        elif ours:  # it was stopped before it knew what to do
            study.tell(trial.number, state=TrialState.FAIL)
    while len(study.get_trials(deepcopy=False, states=ENDED)) < trials:
        number = len(study.get_trials(deepcopy=False))
        mixed = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4])
        study.sampler = SAMPLERS[sampler](mixed)
        trial = study.ask()
        overrides = choices.suggested(trial)
        trial.set_user_attr(OURS, {"overrides": overrides, "place": str(place.resolve())})
        yield study.get_trials()[trial.number], overrides


def _rows(study: optuna.Study, metrics: Sequence[str]) -> list[Row]:
    """The trials that have ended."""
    rows = []
    for trial in study.get_trials(deepcopy=False, states=ENDED):
        note = trial.user_attrs.get(OURS, {})
        values = dict(zip(metrics, trial.values, strict=True)) if trial.state == TrialState.COMPLETE else {}
        reason, recipe = note.get("reason", ""), note.get("recipe", "")
        rows.append(Row(str(trial.number), trial.state.name.lower(), note.get("overrides", {}), values, reason, recipe))
    return rows


def _note(tuned: Tuned, place: Path) -> None:
    """best.yaml and the front, as far as they are known."""
    if not any(row.values for row in tuned.rows):
        return
    (place / "best.yaml").write_text(tuned.best.to_yaml(), encoding="utf-8")
    if len(tuned.metrics) > 1:
        for old in place.glob("pareto-*.yaml"):
            old.unlink()
        for rank, row in enumerate(tuned.front, 1):
            text = f"# {_values(row.values)}\n{tuned.recipe(row).to_yaml()}"
            (place / f"pareto-{rank}.yaml").write_text(text, encoding="utf-8")


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


def _check_text(base: Recipe, choices: Choices, draws: Draws, metrics: Sequence[str]) -> None:
    OBJECTIVES.build(base.objective).check(draws.search)
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


def _values(values: Mapping[str, float]) -> str:
    texts = {"parameters": "{:,.0f}".format, "seconds": span}
    return ", ".join(f"{name} {texts.get(name, '{:.4g}'.format)(value)}" for name, value in values.items())


def _standing(tuned: Tuned, trial: FrozenTrial) -> str:
    row = next(row for row in tuned.rows if row.name == str(trial.number))
    said = _values(row.values) or f"{row.state}, {row.reason}"
    best = next(iter(tuned.front), None) if any(r.values for r in tuned.rows) else None
    return f"trial {row.name}: {said}" + (f"; best {_values(best.values)} of {best.name}" if best else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines and no notes on experimental options; as it was, afterwards."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with catch_warnings():
            simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
