"""Carries a learner's questions to the gated model and the answers back.

Checks every question and the decisions, counts tokens, and replays: losses from the ledger, vectors from files. Weights
that are trained along are saved now and then; from there on the steps of questions on record are taken again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from prunekit.errors import PluginError
from prunekit.plugins.guard import instance
from prunekit.plugins.learner import Decision, Effort, GateProblem, GateQuery, GateReply, Learner, Training
from prunekit.search.ledger import Ledger
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import Progress, series_name

BACK = 3  # a token that goes through the model and back counts as so many that go through it
MOST_QUERIES = 1_000_000
VECTORS = ("gradient", "taylor", "power", "lora", "aligned", "windows")
OF_RANKS = frozenset({"gradient", "aligned", "windows"})  # what there is where patterns are learned
SAVED = 64  # questions from one saved state of the weights to the next


class Answering(Protocol):
    """What answers: a gated model, or what stands for one."""

    def answer(self, query: GateQuery, number: int = 0) -> GateReply:
        """Answer, then take the step that the question asks for."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that later answers depend on; nothing where no weights are trained."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go to a state."""
        ...


@dataclass(frozen=True, eq=False)
class Learned:
    """What a learner has come to."""

    decisions: tuple[Decision, ...]  # one for every budget
    effort: Effort
    weights: str = ""  # sha256 of all steps that weights have taken; "": they are the dense model's


def hold_lesson(
    learner: Learner,
    problem: GateProblem,
    model: Answering,
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
        model: answers; afterwards its weights are those that were trained.
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
    done, reply, past = Effort(0), None, _Past(model, checkpoints)
    with progress.stage(label, said.queries) as stage:
        while True:
            try:
                query = lesson.send(reply) if reply is not None else next(lesson)  # type: ignore[arg-type]
            except StopIteration as stop:
                decisions = stop.value
                break
            query = _checked(query, problem, learner.training, who)
            if done.queries >= MOST_QUERIES:
                raise PluginError(f"{who} asks without end: {done.queries:,} questions")
            reply = _answered(query, done.queries, problem, past, ledger, checkpoints)
            done = _counted(done, query, problem)
            progress.measured({f"{series_name(label)}/loss": reply.loss}, ledger.tokens)
            stage.advance(1, f"loss {reply.loss:.4g}; {ledger.tokens:,} token-forwards")
    found = _decided(decisions, problem, who)
    if done.steps:
        past.catch_up(done.queries)
        past.save(done.queries)
    return Learned(found, done, past.history.hexdigest() if done.steps else "")


@dataclass(eq=False)
class _Past:
    """What of the conversation the weights have not been through: questions on record, whose steps nobody has taken in
    this process."""

    model: Answering
    checkpoints: Checkpoints
    ahead: list[tuple[int, GateQuery]] = field(default_factory=list)
    history: hashlib._Hash = field(default_factory=hashlib.sha256)  # of every step so far
    marks: dict[int, bytes] = field(default_factory=dict)  # number of a question -> the history before it

    def met(self, number: int, query: GateQuery) -> None:
        """A question comes."""
        self._mark(number)
        if query.rate:
            self.history.update(digest_of(query).encode())

    def recalled(self, number: int, query: GateQuery) -> None:
        """Its answer is on record."""
        if query.rate:
            self.ahead.append((number, query))

    def answer(self, number: int, query: GateQuery) -> GateReply:
        """Its answer is new."""
        self.catch_up(number)
        reply = self.model.answer(query, number)
        if query.rate and (number + 1) % SAVED == 0:
            self.save(number + 1)
        return reply

    def catch_up(self, number: int) -> None:
        """Bring the weights to where they are before question `number`."""
        self._mark(number)
        if not self.ahead:
            return
        states = [state for name in ("weights-0", "weights-1") if (state := self.checkpoints.load(name)) is not None]
        known = {int(state["number"]): state for state in states if self._of_this(state) and state["number"] <= number}
        if known and (last := max(known)) > self.ahead[0][0]:
            self.model.restore(known[last])
            self.ahead = [(n, query) for n, query in self.ahead if n >= last]
        for n, query in self.ahead:
            self.model.answer(query, n)
        self.ahead.clear()

    def save(self, number: int) -> None:
        """Save the weights as they are before question `number`; of two files the one that is not the last."""
        self._mark(number)
        if state := self.model.state():
            seal = torch.tensor(list(self.marks[number]), dtype=torch.uint8)
            name = f"weights-{-(-number // SAVED) % 2}"
            self.checkpoints.save(name, {**state, "number": torch.tensor(number), "history": seal})

    def _mark(self, number: int) -> None:
        self.marks.setdefault(number, self.history.digest())

    def _of_this(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a saved state comes of the steps that this conversation has taken."""
        return bytes(state["history"].tolist()) == self.marks.get(int(state["number"]))


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
        done.taylor or bool(query.want & {"taylor", "aligned"}),
        done.steps + (query.rate > 0),
    )


def _tokens(query: GateQuery, problem: GateProblem) -> int:
    own = problem.windows if query.windows is None else len(query.windows)
    return problem.seqlen * (own + len(query.beside))


def _checked(query: GateQuery, problem: GateProblem, training: Training | None, who: str) -> GateQuery:
    """The question with gates of its own, in float64; of what stays whatever is decided they are 1."""
    if not isinstance(query, GateQuery) or not isinstance(query.gates, Tensor):
        raise PluginError(f"{who} asked {query!r}, and a GateQuery with a tensor of gates was due")
    gates = query.gates.detach().to("cpu", torch.float64, copy=True)
    if gates.shape != (problem.groups,) or not bool(torch.isfinite(gates).all()):
        raise PluginError(f"{who}: {problem.groups} finite gates are asked with, not {tuple(gates.shape)}, all finite")
    for windows in (query.windows, query.beside if "aligned" in query.want or query.beside else None):
        if windows is not None and (not windows or not all(0 <= i < problem.windows for i in windows)):
            raise PluginError(f"{who} asked on windows {windows}; there are 0 to {problem.windows - 1}")
    ranked = not all(site.form.shrinks for site in problem.space.sites)
    there = [name for name in VECTORS if name in OF_RANKS or not ranked]
    if strange := sorted(set(query.want) - set(there)):
        raise PluginError(f"{who} wants {strange[0]!r}; there are {', '.join(there)}")
    if not (math.isfinite(query.text) and math.isfinite(query.dense)):
        raise PluginError(f"{who}: the weights of a loss are finite, not {query.text} and {query.dense}")
    if not 0 <= query.rate < math.inf or (query.rate and training is None):
        raise PluginError(f"{who} asked for a step of {query.rate}; a finite rate goes with a `training`")
    if "lora" in query.want and (training is None or not training.rank):
        raise PluginError(f"{who} wants 'lora', the slopes of adapters; it goes with a `training` of some rank")
    return replace(query, gates=gates.masked_fill_(problem.fixed, 1.0))


def digest_of(query: GateQuery) -> str:
    """sha256 of a checked question."""
    asked = hashlib.sha256(query.gates.numpy().astype("<f8").tobytes())
    asked.update(repr(query.windows).encode())
    if query.rate or query.beside:
        asked.update(repr((query.rate, query.beside, query.text, query.dense)).encode())
    return asked.hexdigest()


def _answered(
    query: GateQuery,
    number: int,
    problem: GateProblem,
    past: _Past,
    ledger: Ledger,
    checkpoints: Checkpoints,
) -> GateReply:
    """The answer on record, or a new one, put on record: first the vectors, then the loss."""
    past.met(number, query)
    question = {
        "kind": "gates",
        "number": number,
        "of": digest_of(query)[:16],
        "want": sorted(query.want),
        "loss_of": [query.text, query.dense],
        "tokens": tokens_of(_counted(Effort(0), query, problem)),
        **({"rate": query.rate} if query.rate else {}),
    }
    name, loss = f"reply-{number}", ledger.recall(question)
    kept = checkpoints.load(name) if loss is not None and query.want else {}
    if loss is not None and kept is not None and set(kept) >= query.want:
        past.recalled(number, query)
        return GateReply(loss, **{want: kept[want].double() for want in query.want})
    reply = past.answer(number, query)
    vectors = {want: getattr(reply, want).detach().cpu() for want in sorted(query.want)}
    if query.want:
        checkpoints.save(name, vectors)
    if loss is None:
        ledger.answer(question, reply.loss)
    return GateReply(reply.loss, **{want: vector.double() for want, vector in vectors.items()})


def _decided(decisions: object, problem: GateProblem, who: str) -> tuple[Decision, ...]:
    """The decisions, if each is one of its space; what stays whatever is decided has no scale.

    Raises:
        PluginError: says what is wrong.
    """
    spaces, groups = problem.spaces, problem.groups
    if not isinstance(decisions, Sequence) or len(decisions) != len(spaces):
        raise PluginError(f"{who} returned {str(decisions)[:60]}, and {len(spaces)} decisions were asked")
    for decision, space in zip(decisions, spaces, strict=True):
        if not isinstance(decision, Decision) or len(decision.kept) != len(space.sites):
            raise PluginError(
                f"{who} decided {str(decision)[:60]}, which is no Decision about {len(space.sites)} sites"
            )
        for site, size, kept in zip(space.sites, problem.knapsacks[-1].sizes, decision.kept, strict=True):
            if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < size):
                raise PluginError(f"{who}: groups of {site.name} are ascending ids below {size}")
            if not site.form.shrinks and kept != tuple(range(len(kept))):
                raise PluginError(f"{who}: of {site.name} the first ranks are kept, not {kept}")
        if not space.is_feasible(decision.counts):
            raise PluginError(
                f"{who} decided on {decision.counts}, which costs {space.cost(decision.counts):,} and is not feasible "
                f"under the budget of {space.budget.limit:,} {space.budget.metric.unit}"
            )
        scales = decision.scales
        if scales is not None and (scales.shape != (groups,) or not bool(torch.isfinite(scales).all())):
            raise PluginError(f"{who}: scales are {groups} finite numbers, one for every group")
        shares, known = decision.domains, len(problem.domains)
        if shares and (len(shares) != known or not all(0 <= share < math.inf for share in shares)):
            raise PluginError(f"{who}: domains are {known} shares, one for every data set, not {shares}")
    return tuple(
        each if each.scales is None else replace(each, scales=each.scales.masked_fill(problem.fixed, 1.0))
        for each in decisions
    )
