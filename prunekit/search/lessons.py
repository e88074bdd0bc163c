"""Carries a learner's questions to the gated model and the answers back.

Checks every question and the decisions, counts tokens, and replays: losses from the ledger, vectors from files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunekit.errors import PluginError
from prunekit.plugins.guard import instance
from prunekit.plugins.learner import Decision, Effort, GateProblem, GateQuery, GateReply, Learner
from prunekit.search.ledger import Ledger
from prunekit.space.ladders import Space
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import Progress

BACK = 3  # a token that goes through the model and back counts as so many that go through it
MOST_QUERIES = 1_000_000
VECTORS = ("gradient", "taylor", "power")


@dataclass(frozen=True, eq=False)
class Learned:
    """What a learner has come to."""

    decisions: tuple[Decision, ...]  # one for every budget
    effort: Effort


def hold_lesson(
    learner: Learner,
    problem: GateProblem,
    answer: Callable[[GateQuery], GateReply],
    ledger: Ledger,
    checkpoints: Checkpoints,
    *,
    progress: Progress,
    label: str = "learn",
) -> Learned:
    """Hold a learner's conversation.

    Budgets under which the dense model may stay need none.

    Args:
        learner: asks.
        problem: what it is told.
        answer: of the gated model.
        ledger: records, or replays, every question with its loss.
        checkpoints: keep the vectors of the answers; one that is missing is computed again.
        progress: advanced at every question.
        label: of the stage.

    Returns:
        The decisions, and what was read, replayed questions included.

    Raises:
        PluginError: a question or a decision breaks the contract.
    """
    who, all_of_it = type(learner).__name__, tuple(site.n_groups for site in problem.space.sites)
    if problem.space.is_feasible(all_of_it):
        whole = problem.decision(torch.ones(problem.groups, dtype=torch.bool))
        return Learned((whole,) * len(problem.spaces), Effort(0))
    said = instance(learner, "its effort", learner.effort(problem.windows, problem.seqlen, len(problem.spaces)), Effort)
    lesson = instance(learner, "its lesson", learner.learn(problem), Generator)
    done, reply = Effort(0), None
    with progress.stage(label, said.queries) as stage:
        while True:
            try:
                query = lesson.send(reply) if reply is not None else next(lesson)  # type: ignore[arg-type]
            except StopIteration as stop:
                decisions = stop.value
                break
            query = _checked(query, problem, who)
            if done.queries >= MOST_QUERIES:
                raise PluginError(f"{who} asks without end: {done.queries:,} questions")
            reply = _answered(query, done.queries, problem, answer, ledger, checkpoints)
            done = _counted(done, query, problem)
            stage.advance(1, f"loss {reply.loss:.4g}; {ledger.tokens:,} token-forwards")
    return Learned(_decided(decisions, problem.spaces, problem.groups, who), done)


def tokens_of(effort: Effort) -> int:
    """Token-forwards: one that goes through the model and back counts as `BACK`."""
    return effort.forward + BACK * effort.back + effort.dense


def _counted(done: Effort, query: GateQuery, problem: GateProblem) -> Effort:
    tokens = _tokens(query, problem)
    return Effort(
        done.queries + 1,
        done.forward + (0 if query.back else tokens),
        done.back + (tokens if query.back else 0),
        done.dense + (tokens if query.dense else 0),
        done.taylor or "taylor" in query.want,
    )


def _tokens(query: GateQuery, problem: GateProblem) -> int:
    return problem.seqlen * (problem.windows if query.windows is None else len(query.windows))


def _checked(query: GateQuery, problem: GateProblem, who: str) -> GateQuery:
    """The question with gates of its own, in float64."""
    if not isinstance(query, GateQuery) or not isinstance(query.gates, Tensor):
        raise PluginError(f"{who} asked {query!r}, and a GateQuery with a tensor of gates was due")
    gates = query.gates.detach().to("cpu", torch.float64, copy=True)
    if gates.shape != (problem.groups,) or not bool(torch.isfinite(gates).all()):
        raise PluginError(f"{who}: {problem.groups} finite gates are asked with, not {tuple(gates.shape)}, all finite")
    windows = query.windows
    if windows is not None and (not windows or not all(0 <= i < problem.windows for i in windows)):
        raise PluginError(f"{who} asked on windows {windows}; there are 0 to {problem.windows - 1}")
    if strange := sorted(set(query.want) - set(VECTORS)):
        raise PluginError(f"{who} wants {strange[0]!r}; there are {', '.join(VECTORS)}")
    if not (math.isfinite(query.text) and math.isfinite(query.dense)):
        raise PluginError(f"{who}: the weights of a loss are finite, not {query.text} and {query.dense}")
    return replace(query, gates=gates)


def _answered(
    query: GateQuery,
    number: int,
    problem: GateProblem,
    answer: Callable[[GateQuery], GateReply],
    ledger: Ledger,
    checkpoints: Checkpoints,
) -> GateReply:
    """The answer on record, or a new one, put on record: first the vectors, then the loss."""
    asked = hashlib.sha256(query.gates.numpy().astype("<f8").tobytes())
    asked.update(repr(query.windows).encode())
    single = Effort(0)
    question = {
        "kind": "gates",
        "number": number,
        "of": asked.hexdigest()[:16],
        "want": sorted(query.want),
        "loss_of": [query.text, query.dense],
        "tokens": tokens_of(_counted(single, query, problem)),
    }
    name, loss = f"reply-{number}", ledger.recall(question)
    kept = checkpoints.load(name) if loss is not None and query.want else {}
    if loss is not None and kept is not None and set(kept) >= query.want:
        return GateReply(loss, **{want: kept[want].double() for want in query.want})
    reply = answer(query)
    vectors = {want: getattr(reply, want).detach().cpu() for want in sorted(query.want)}
    if query.want:
        checkpoints.save(name, vectors)
    if loss is None:
        ledger.answer(question, reply.loss)
    return GateReply(reply.loss, **{want: vector.double() for want, vector in vectors.items()})


def _decided(decisions: object, spaces: Sequence[Space], groups: int, who: str) -> tuple[Decision, ...]:
    """The decisions, if each is one of its space.

    Raises:
        PluginError: says what is wrong.
    """
    if not isinstance(decisions, Sequence) or len(decisions) != len(spaces):
        raise PluginError(f"{who} returned {str(decisions)[:60]}, and {len(spaces)} decisions were asked")
    for decision, space in zip(decisions, spaces, strict=True):
        if not isinstance(decision, Decision) or len(decision.kept) != len(space.sites):
            raise PluginError(
                f"{who} decided {str(decision)[:60]}, which is no Decision about {len(space.sites)} sites"
            )
        for site, kept in zip(space.sites, decision.kept, strict=True):
            if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < site.n_groups):
                raise PluginError(f"{who}: groups of {site.name} are ascending ids below {site.n_groups}")
        if not space.is_feasible(decision.counts):
            raise PluginError(
                f"{who} decided on {decision.counts}, which costs {space.cost(decision.counts):,} and is not feasible "
                f"under the budget of {space.budget.limit:,} {space.budget.metric.unit}"
            )
        scales = decision.scales
        if scales is not None and (scales.shape != (groups,) or not bool(torch.isfinite(scales).all())):
            raise PluginError(f"{who}: scales are {groups} finite numbers, one for every group")
    return tuple(decisions)
