"""How fast the cells of a comparison are: each small model timed in turns with the dense one, where that is asked for.

What is timed is chosen once, of the dense model, and kept in its row, so that all cells of a model do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from prunekit.errors import WrongInput, first_line
from prunekit.export import hf
from prunekit.measure.ratios import FEWEST
from prunekit.measure.speed import ROUNDS, SECONDS, Speed, ratios, speeds
from prunekit.models.paging import pager_of
from prunekit.recipe.suite import Suite
from prunekit.report.comparison import Row
from prunekit.run.session import Job, Session
from prunekit.run.workplace import begun
from prunekit.space.forms import parse_form
from prunekit.space.prices import Workload
from prunekit.system.progress import span

FEW = 3  # rounds of the dense model alone, however long they take


def check_speed(suite: Suite, job: Job) -> None:
    """Refuse, before any work, to time what cannot be faster, and to go on with rows that were made the other way.

    Raises:
        WrongInput: what is pruned to zeros takes as long as before, or the folder holds the same comparison with speed
            and none was asked for, or without.
    """
    if suite.speed and not parse_form(structure := suite.base().structure).shrinks:
        raise WrongInput(
            f"speed: structure {structure} leaves zeros, which take as long as other weights in every "
            "kernel used here, so there is nothing to time; leave speed away, or remove groups, experts or ranks"
        )
    found = None if job.output is None or job.overwrite else begun(job.output)
    there = None if found is None else found.get("suite")
    if isinstance(there, Mapping) and there.get("speed", False) != suite.speed and {**there, "speed": None} == {
        **identity_of(suite), "speed": None
    }:  # fmt: skip
        has, other = ("without", "leave speed away") if suite.speed else ("with", "ask for speed again")
        raise WrongInput(
            f"{job.output} holds this comparison {has} speed, and small models are not kept, to be timed later; "
            f"{other}, choose another --output, or begin again with --overwrite"
        )


def identity_of(suite: Suite) -> dict[str, Any]:
    """What a folder says of its comparison: speed only where it is measured, so that folders from before go on."""
    return suite.model_dump(mode="json", exclude=None if suite.speed else {"speed"})


def time_dense(session: Session) -> dict[str, Any]:
    """Time the dense model, and choose what is timed.

    Args:
        session: of the comparison.

    Returns:
        Fields of its row.

    Raises:
        WrongInput: it does not fit memory, or keeps no cache.
    """
    model = session.dense.model
    if pager_of(model) is not None:
        raise WrongInput(
            "speed: the model is read from disk block by block, and so would be the time; give more --memory, or leave "
            "speed away"
        )
    try:
        return _told(speeds({"dense": model}, session.progress, fewest=FEW)["dense"])
    except NotImplementedError as error:
        raise WrongInput(
            f"speed: {session.dense.name} cannot be timed: {first_line(error)}; leave speed away"
        ) from error


def time_cell(session: Session, small: PreTrainedModel, dense: Row) -> dict[str, Any]:
    """Time a small model in turns with the dense one, round by round.

    Args:
        session: of the comparison.
        small: as it was judged.
        dense: the row of the dense model.

    Returns:
        Fields of the row; where it cannot be timed, the reason: what it was judged to be is not lost for that.
    """
    try:
        models = {"dense": session.dense.model, "small": hf.to_transformers(small, session.dense.adapter)}
        found = speeds(models, session.progress, work=Workload(**dense.workload))
        return _told(found["small"]) | _without_verdict(ratios(found["small"], found["dense"]))
    except Exception as error:  # of a class of anybody's
        return {"timed": f"not timed: {type(error).__name__}: {first_line(error)}"}


def seconds_of(dense: Row) -> float:
    """What timing a cell takes at most, about: as many rounds as there are time for, of two turns of the dense model.

    Args:
        dense: the row of the dense model, whose seconds are those of judging alone.

    Returns:
        Seconds on the wall; 0 where nothing is timed.
    """
    if not dense.rounds:
        return 0.0
    a_round = 2 * (dense.wall - dense.seconds) / dense.rounds
    return max(FEWEST * a_round, min(ROUNDS * a_round, SECONDS + a_round))


def announcement(dense: Row, cells: int) -> str:
    """What is timed, and what that takes, in a sentence."""
    each = seconds_of(dense)
    return (
        f"every cell is timed in turns with the dense model ({dense.timed}), at most about {span(each)} each: "
        f"{span(cells * each)} for {cells:,}"
    )


def _told(speed: Speed) -> dict[str, Any]:
    found = speed.as_dict()
    kept = ("prefill_tokens_per_second", "decode_tokens_per_second", "workload", "rounds")
    return {key: found[key] for key in kept} | {"timed": speed.how}


def _without_verdict(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without what follows from the intervals, which are immutable in a row."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in found.items() if not key.endswith("_clear")
    }  # fmt: skip
