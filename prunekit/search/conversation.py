"""Carries an allocator's questions to the objective and the losses back.

Checks every question, judges none twice, counts tokens, stops at the limit, and replays a ledger. Conversations about
one network may share what they learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from prunekit.data.tokens import TokenBatch
from prunekit.errors import PluginError
from prunekit.plugins.allocator import Allocator, Journal, Problem, Query
from prunekit.plugins.guard import instance
from prunekit.plugins.objective import Objective, Reads
from prunekit.search.ledger import Ledger
from prunekit.search.probing import Spent, Tally
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation
from prunekit.system.progress import Progress, series_name

MOST_IDLE = 10_000  # asks in a row that ask nothing new: they cost nothing, and no limit ends them
MOST_QUESTIONS = 2_000_000  # of one search
Known = dict[tuple[Allocation, int], float]
"""Losses by allocation and tokens; whether an allocation was a probe is no part of the question."""


class Judge(Protocol):
    """Whoever answers for the objective, such as a supernet."""

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        ...

    def judged(
        self, objective: Objective, allocations: Sequence[Allocation], batch: TokenBatch
    ) -> Iterator[tuple[Allocation, float]]:
        """Every allocation once, in order, and what the objective says of it."""
        ...

    def loss(self, objective: Objective, allocation: Allocation, batch: TokenBatch) -> float:
        """What an objective says of an allocation."""
        ...


@dataclass(frozen=True)
class Judgement:
    """A loss and the tokens it was measured on."""

    allocation: Allocation
    tokens: int
    loss: float


@dataclass(frozen=True)
class Outcome:
    """What a search came to."""

    answer: Allocation
    judgement: Judgement | None  # of the answer, on the most tokens it was judged on
    questions: int


@dataclass(frozen=True)
class Recorded(Journal):
    """The journal of a run: its ledger, so that it is replayed with the questions."""

    ledger: Ledger
    pass_number: int
    progress: Progress

    def once(self, question: Mapping[str, Any], answer: Callable[[], Any]) -> Any:
        return self.ledger.once({"kind": "note", "walk": self.pass_number, **question}, answer)

    def note(self, line: str) -> None:
        self.ledger.note({"kind": "note", "walk": self.pass_number, "note": line})
        self.progress.say(line)


def converse(
    allocator: Allocator,
    problem: Problem,
    net: Judge,
    objective: Objective,
    tokens: TokenBatch,
    ledger: Ledger,
    *,
    pass_number: int,
    limit: int | None = None,
    known: Known | None = None,
    progress: Progress,
    label: str = "search",
) -> Outcome:
    """Hold the conversation; return the allocator's answer.

    Token-forwards are counted per new question.

    Args:
        allocator: asks.
        problem: what it is told.
        net: answers for the objective; of the problem's space.
        objective: judges.
        tokens: of the search.
        ledger: records, or replays, every question.
        pass_number: of the calibration pass that filled `net`, from 0.
        limit: token-forwards of the whole run; when the next ask would take the ledger past it the search ends with
            the best allocation judged so far, or the start.
        known: what other conversations about `net` have learnt from the same tokens, not judged again; what this one
            learns is added.
        progress: advanced at every question, and told every loss that was paid for.
        label: of the stage.

    Raises:
        PluginError: a question or the answer breaks the space, or nothing was asked.
    """

    def training(count: int) -> int:
        """Token-forwards beside those of a question on so many tokens: what is learnt from goes forwards and back."""
        learnt = objective.training(count) if reads else 0
        return 3 * tokens.lessons.first(learnt).n_tokens if learnt and tokens.lessons is not None else 0

    def tell(what: str, loss: float) -> None:
        """Tell programs a loss by what was paid; of free ones, which come by the thousand, the best alone."""
        if reads:
            progress.measured({f"{series_name(label)}/{what}": loss}, ledger.tokens)
        elif what == "best":
            progress.measured({f"{series_name(label)}/best_by_question": loss}, ledger.questions)

    who, reads = (
        type(allocator).__name__,
        instance(objective, "what it reads", objective.reads(net.depth), Reads).tokens,
    )
    known = {} if known is None else known
    judged: Known = {}
    able: Known = {}  # those that can win: not probes
    search = allocator.search(replace(problem, journal=Recorded(ledger, pass_number, progress)))
    search = instance(allocator, "its search", search, Generator)
    losses: list[float] | None = None
    idle = 0  # asks in a row in which nothing was new
    tally = Tally()
    with progress.stage(label, 0) as stage:
        while True:
            try:
                queries = search.send(losses) if losses is not None else next(search)  # type: ignore[arg-type]
            except StopIteration as stop:
                answer = stop.value
                if not judged and allocator.asks:
                    raise PluginError(f"{who} answered without a question") from None
                break
            if not allocator.asks:
                raise PluginError(f"{who} says that it does not ask, and asked")
            queries = instance(allocator, "what it asks", queries, Sequence)
            asked = [_asked(query, problem, tokens, reads, who) for query in queries]
            if not asked:
                raise PluginError(f"{who} asked without a question")
            new = [key for key in dict.fromkeys(asked) if key not in judged]
            idle = 0 if new else idle + 1
            if idle > MOST_IDLE or len(judged) + len(new) > MOST_QUESTIONS:
                raise PluginError(
                    f"{who} asks without end: {len(judged):,} questions, and {idle:,} asks without a new one"
                )
            prices = {key: key[1] + training(key[1]) for key in new if key not in known}
            price = sum(prices.values())
            if limit is not None and ledger.tokens + price > limit:
                _stop(tally.ended(limit, price), ledger, pass_number, progress)
                answer = best(able).allocation if able else problem.start
                break
            for loss in _judge(new, known, problem.space, net, objective, tokens, ledger, pass_number, training):
                tell("loss", loss)
            judged |= {key: known[key] for key in new}
            losses = [judged[key] for key in asked]
            tally.count({key for key, query in zip(asked, queries, strict=True) if query.probe}, new, prices)
            able |= {key: judged[key] for key in new if problem.space.is_feasible(key[0])}
            so_far = ""
            if able:
                found = best(able)
                tell("best", found.loss)
                so_far = f"loss {found.loss:.4g} on {found.tokens:,} tokens; "
            stage.advance(len(new), f"{so_far}{ledger.tokens:,} token-forwards")
    if not (_is_counts(answer) and problem.space.is_feasible(answer)):
        raise PluginError(f"{who} answered {answer!r}, which is not a feasible allocation of this space")
    if judged and not any(map(math.isfinite, judged.values())):
        raise PluginError(
            f"{type(objective).__name__} has no finite loss for any of {len(judged)} allocations, so that none is "
            "better than another; choose another objective, or look at the model and its text"
        )
    of_answer = [Judgement(a, t, loss) for (a, t), loss in judged.items() if a == answer]
    return Outcome(answer, max(of_answer, key=lambda j: j.tokens, default=None), len(judged))


def _stop(spent: Spent, ledger: Ledger, pass_number: int, progress: Progress) -> None:
    """Say and put on record that the limit ends a search."""
    progress.say(f"search stops at {ledger.tokens:,} token-forwards; the limit is {spent.limit:,}")
    if words := spent.words:
        progress.say(f"warning: {words}")
    ledger.note({"kind": "limit", "walk": pass_number, **asdict(spent)})


def best(judged: Known) -> Judgement:
    """The lowest loss among those judged on the most tokens; the earlier on a tie."""
    (allocation, tokens), loss = min(judged.items(), key=lambda item: (-item[0][1], item[1]))
    return Judgement(allocation, tokens, loss)


def _asked(query: Query, problem: Problem, tokens: TokenBatch, reads: bool, who: str) -> tuple[Allocation, int]:
    if not (isinstance(query, Query) and _is_counts(query.allocation) and isinstance(query.tokens, int | None)) or not (
        problem.space.is_feasible(query.allocation) or (query.probe and problem.space.is_probe(query.allocation))
    ):
        raise PluginError(f"{who} asked for {query!r}, which is not a feasible allocation of this space nor a probe")
    return query.allocation, tokens.first(query.tokens).n_tokens if reads else 0


def _is_counts(allocation: Any) -> bool:
    return isinstance(allocation, tuple) and all(isinstance(count, int) for count in allocation)


def _judge(
    new: list[tuple[Allocation, int]],
    known: Known,
    space: Space,
    net: Judge,
    objective: Objective,
    tokens: TokenBatch,
    ledger: Ledger,
    pass_number: int,
    training: Callable[[int], int],
) -> Iterator[float]:
    """Answer new questions from the ledger, then from what is known, then from the network, one fidelity together.

    Yields the loss of each as soon as it is on record.
    """
    answers: dict[int, Iterator[tuple[Allocation, float]]] = {}  # by fidelity
    for i, (allocation, count) in enumerate(new):
        question = {"kind": "question", "walk": pass_number, "allocation": list(allocation), "tokens": count}
        if beside := training(count):
            question["training"] = beside
        if not space.is_feasible(allocation):
            question["probe"] = True
        if shared := (allocation, count) in known:
            question["shared"] = True
        loss = ledger.recall(question)
        if loss is None and shared:
            loss = known[allocation, count]
            ledger.answer(question, loss)
        elif loss is None:
            if not count:
                loss = net.loss(objective, allocation, tokens)
            else:
                if count not in answers:  # what is on record comes first: from here on the network is asked
                    ahead = [a for a, c in new[i:] if c == count and (a, c) not in known]
                    answers[count] = net.judged(objective, ahead, tokens.first(count))
                found, loss = next(answers[count])
                assert found == allocation
            loss = float(loss) if math.isfinite(loss) else math.inf  # as it is read again
            ledger.answer(question, loss)
        known[allocation, count] = loss
        yield loss
