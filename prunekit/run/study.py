"""A study on disk: which recipes were tried, what came of them, which to try next. Optuna's, in our words."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

from prunekit.errors import WrongInput, one_line, without_secrets
from prunekit.recipe.choices import Choices
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.report.page.study import TRIALS, listed_recipes
from prunekit.system.files import write_json
from prunekit.system.progress import span

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise ImportError("prunekit tune needs optuna, which is not installed: pip install 'prunekit[optuna]'") from error

Sampler = Literal["tpe", "nsga-ii", "nsga-iii"]
"""Optuna's, who proposes trials; an NSGA draws its first 50 at random and breeds generations of 50 from then on."""


SAMPLERS: Mapping[Sampler, Callable[[int], optuna.samplers.BaseSampler]] = {  # by seed; what else they know is kept
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
    "nsga-ii": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga-iii": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
}
ATTEMPTS = 5  # to open a database
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

    @property
    def done(self) -> list[Row]:
        """The first row of every recipe that ended well."""
        return list({row.recipe: row for row in reversed(self.rows) if row.values}.values())[::-1]

    @cached_property
    def front(self) -> list[Row]:
        """The rows that no other row beats, best first in the first metric; one for one metric."""
        points = {row.name: tuple(row.values[m] for m in self.metrics) for row in self.done}

        def beaten(row: Row) -> bool:
            mine = points[row.name]
            return any(other != mine and all(map(float.__le__, other, mine)) for other in points.values())

        front = sorted((row for row in self.done if not beaten(row)), key=lambda row: points[row.name])
        return front if len(self.metrics) > 1 else front[:1]

    @property
    def best(self) -> Recipe:
        """The recipe that is best in the first metric."""
        return self.recipe(self.front[0])

    def _repr_html_(self) -> str:
        front = {row.name for row in self.front} if self.done else set[str]()
        return listed_recipes([asdict(row) for row in self.rows], self.metrics, front)

    def recipe(self, row: Row) -> Recipe:
        """The recipe of a row, complete."""
        return resolve(self.base.with_overrides(row.overrides)).recipe


def open_study(
    place: Path, storage: str | None, name: str, identity: Mapping[str, Any], directions: int, keep: bool
) -> optuna.Study:
    """Open the study of an identity, or create it where there is none.

    Args:
        place: folder of the study.
        storage: URL of a database; None: a journal in `place`.
        name: of the study in its storage.
        identity: what must agree for a study to be continued.
        directions: how many metrics there are, all minimized.
        keep: whether a study that is there is continued, else deleted.

    Raises:
        WrongInput: the storage cannot be opened, or holds another study of that name.
    """
    mine = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    minimized = [optuna.study.StudyDirection.MINIMIZE] * directions

    def opened(attempts: int) -> optuna.Study:
        where: Any = storage
        try:
            if storage is None:
                _mend(place / "study.log")
                where = optuna.storages.JournalStorage(JournalFileBackend(str(place / "study.log")))
            elif not keep and name in optuna.get_all_study_names(where):
                optuna.delete_study(study_name=name, storage=where)
            return optuna.create_study(storage=where, study_name=name, directions=minimized, load_if_exists=True)
        except Exception as error:
            database = type(error).__module__.split(".")[0] in ("sqlalchemy", "optuna")  # not imported for this
            if not (database or isinstance(error, ImportError | OSError | RuntimeError | ValueError | KeyError)):
                raise
            if database and attempts > 1:  # another process may make the same tables or the same study
                time.sleep(0.5 / attempts)
                return opened(attempts - 1)
            what = place / "study.log" if storage is None else storage
            said = one_line(error).replace(str(what), without_secrets(str(what)))
            raise WrongInput(f"the storage {without_secrets(str(what))!r} cannot be opened: {said}") from error

    study = opened(ATTEMPTS)
    if study.user_attrs.setdefault(OURS, mine) != mine:
        raise WrongInput(
            f"{without_secrets(str(storage))} holds another study called {name!r}; "
            "choose another --study-name, or --overwrite"
        )
    study.set_user_attr(OURS, mine)
    return study


def database_of(storage: str | None) -> Path | None:
    """The file of a storage that is one, which other studies may share."""
    kind, _, file = (storage or "").partition(":///")
    return Path(file.partition("?")[0]).resolve() if kind.startswith("sqlite") and file else None


def _mend(log: Path) -> None:
    """Undo what a writer that was killed has left: its lock, and half a line, to which the next would be added."""
    for lock in log.parent.glob(f"{log.name}.lock*"):  # this folder is ours alone, so nobody holds it
        lock.unlink()
    text = log.read_bytes() if log.exists() else b""
    if text and not text.endswith(b"\n"):
        with log.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


def propose_trials(
    study: optuna.Study, choices: Choices, trials: int, seed: int, place: Path, sampler: Sampler
) -> Iterator[FrozenTrial]:
    """Propose trials: first those that an earlier run of this folder has left unfinished.

    Yields trials, whose note holds their overrides of the base recipe, until as many as `trials` have ended. The
    sampler of a trial is seeded by the trial's number and a trial is written down at once, when all of it is chosen,
    so that a study that was interrupted goes on as if it had not been.
    """
    here = str(place.resolve())
    running = study.get_trials(states=[TrialState.RUNNING])
    yield from (trial for trial in running if trial.user_attrs.get(OURS, {}).get("place") == here)
    while len(study.get_trials(deepcopy=False, states=ENDED)) < trials:
        draft = optuna.create_study(directions=study.directions)
        draft.add_trials(study.get_trials(deepcopy=False))
        number = len(draft.get_trials(deepcopy=False))
        mixed = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4])
        draft.sampler = SAMPLERS[sampler](mixed)
        chosen = draft.ask()
        chosen.set_user_attr(OURS, {"overrides": choices.suggested(chosen), "place": here})
        made = study._storage.create_new_trial(study._study_id, draft.get_trials()[number])  # it alone says which
        yield study._storage.get_trial(made)


def read_rows(study: optuna.Study, metrics: Sequence[str]) -> list[Row]:
    """Read the trials that have ended."""
    rows = []
    for trial in study.get_trials(deepcopy=False, states=ENDED):
        note = trial.user_attrs.get(OURS, {})
        values = dict(zip(metrics, trial.values, strict=True)) if trial.state == TrialState.COMPLETE else {}
        reason, recipe = note.get("reason", ""), note.get("recipe", "")
        rows.append(Row(str(trial.number), trial.state.name.lower(), note.get("overrides", {}), values, reason, recipe))
    return rows


def write_found(tuned: Tuned, place: Path) -> None:
    """Write all rows, best.yaml and the front, as far as they are known."""
    done = bool(tuned.done)
    write_json(
        place / TRIALS,
        {
            "schema": 1,
            "model": str(tuned.base.model),
            "sparsity": tuned.base.sparsity,
            "metrics": list(tuned.metrics),
            "front": [row.name for row in tuned.front] if done else [],
            "rows": [asdict(row) for row in tuned.rows],
        },
    )
    if not done:
        return
    (place / "best.yaml").write_text(tuned.best.to_yaml(), encoding="utf-8")
    if len(tuned.metrics) > 1:
        for old in place.glob("pareto-*.yaml"):
            old.unlink()
        for rank, row in enumerate(tuned.front, 1):
            text = f"# {format_values(row.values)}\n{tuned.recipe(row).to_yaml()}"
            (place / f"pareto-{rank}.yaml").write_text(text, encoding="utf-8")


def format_values(values: Mapping[str, float]) -> str:
    texts = {"parameters": "{:,.0f}".format, "seconds": span}
    return ", ".join(f"{name} {texts.get(name, '{:.4g}'.format)(value)}" for name, value in values.items())


@contextmanager
def silence_optuna() -> Iterator[None]:
    """Have neither log lines nor notes on experimental options; as it was, afterwards."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with catch_warnings():
            simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
