"""The ledger of a run as an Optuna study, which optuna-dashboard and Optuna's own plots read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prunekit.errors import WrongInput, one_line, without_secrets

EXTRA = "a study needs optuna, which is not installed: pip install 'prunekit[optuna]'"


def write_study(ledger: Sequence[Mapping[str, Any]], storage: str, name: str) -> int:
    """Write every question of a run as a trial: what each site kept, and the loss; attributes say on how many tokens.

    Args:
        ledger: records, as in ledger.jsonl.
        storage: URL of an Optuna storage.
        name: of the new study.

    Returns:
        The number of trials.

    Raises:
        WrongInput: there are no questions, the study exists, the storage cannot be opened, or optuna is missing.
    """
    try:
        import optuna
    except ImportError as error:
        raise WrongInput(EXTRA) from error
    trials = list(_trials(ledger))
    if not trials:
        raise WrongInput("this run asked no question, for its recipe does not search; there is nothing to write")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
        study.add_trials(trials)
    except optuna.exceptions.DuplicatedStudyError as error:
        raise WrongInput(
            f"{without_secrets(storage)} has a study called {name!r}; choose another --study-name"
        ) from error
    except Exception as error:  # each database has errors of its own
        said = one_line(error).replace(storage, without_secrets(storage))
        raise WrongInput(f"the storage {without_secrets(storage)!r} cannot be opened: {said}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)
    return len(trials)


def _trials(ledger: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """One per question, in the order of the run; those of a pass over the model have the ladders of that pass."""
    from optuna.distributions import IntDistribution
    from optuna.trial import TrialState, create_trial

    space: Mapping[str, Any] = {}
    spent = 0
    for record in ledger:
        if record.get("kind") == "space":
            space = record
        if record.get("kind") != "question":
            continue
        ladders = dict(zip(space["sites"], space["ladders"], strict=True))
        kept = dict(zip(space["sites"], record["allocation"], strict=True))
        spent += 0 if "shared" in record else record["tokens"] + record.get("training", 0)
        loss = record["loss"]
        whole = loss is not None and math.isfinite(loss)
        yield create_trial(
            state=TrialState.COMPLETE if whole else TrialState.FAIL,
            value=loss if whole else None,
            params=kept,
            distributions={
                site: IntDistribution(min(*ladder, kept[site]), max(*ladder, kept[site]))
                for site, ladder in ladders.items()
            },
            user_attrs={"tokens": record["tokens"], "token_forwards": spent, "pass": record.get("walk", 0)},
        )
