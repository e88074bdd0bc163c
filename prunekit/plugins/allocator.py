"""Allocators: how much each site keeps, found in a conversation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput
from prunekit.plugins.signal import Measurable
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation


@dataclass(frozen=True)
class Query:
    """A question: how good is this allocation, judged on this many tokens (None: all there are)?

    A probe may cost more than the budget: it teaches, but what is not feasible cannot win. Each of its
    counts is a rung, or all groups of the site: the dense sub-layer where the ladder lacks that count.
    """

    allocation: Allocation
    tokens: int | None = None
    probe: bool = False


class Journal:
    """What a search learns from elsewhere than its losses. This one forgets at once; that of a run is its ledger."""

    def once(self, question: Mapping[str, Any], answer: Callable[[], Any]) -> Any:
        """The answer to a question, both JSON values: the one on record, or that of `answer()`, put on record.

        Whatever is not a function of the problem (another program's reply, a clock) comes through here, so that a
        resumed run holds the same conversation without asking again. What `answer` raises is not recorded.
        """
        return answer()

    def note(self, line: str) -> None:
        """A line for the record and for the user."""


@dataclass(frozen=True)
class Problem:
    """All an allocator may see: numbers, no torch.

    errors[i][r] is the relative output error of site i at rung r of its ladder. Nats, signals and scores are there when
    the allocator asks for them; in every calibration pass they are measured on what reaches the site in it.
    """

    space: Space
    errors: tuple[tuple[float, ...], ...]
    start: Allocation  # feasible and tight: the uniform allocation, or the centre of the ladders
    seed: int = 0
    tokens: int = 0  # tokens there are to judge on; queries for more are answered on these
    signals: tuple[tuple[float, ...], ...] = ()  # signals[s][i]: the allocator's signal s at site i
    scores: tuple[tuple[float, ...], ...] | None = None  # scores[i][g]: what the pruner says group g of site i is worth
    nats: tuple[tuple[float, ...], ...] | None = None  # nats[i][r]: what rung r of site i costs the model, per token
    journal: Journal = field(default_factory=Journal, compare=False, repr=False)

    def error(self, site: int, kept: int) -> float:
        """Relative output error of a site at a count on its ladder."""
        return self.errors[site][self.space.ladders[site].index(kept)]


Search = Generator[Sequence[Query], Sequence[float], Allocation]
"""Yields questions, is sent as many losses (lower is better, inf for what failed), returns its answer."""


@dataclass(frozen=True)
class Searched:
    """What the searches under one budget have found."""

    whole: Space  # every count of every site, under the budget
    judged: tuple[tuple[Allocation, float], ...]
    """Feasible allocations, each once with its loss on the most tokens it was judged on: those on most tokens first,
    and of them the best."""
    tokens: tuple[int, ...] = ()  # that each of them was judged on
    problem: Problem | None = None  # what the allocator was given, in the last pass


class Allocator(ABC):
    """Decides how much each site keeps, as a conversation. What wraps another asks for what that one asks for."""

    @property
    def signals(self) -> tuple[Measurable, ...]:
        """What to measure at every site, in every calibration pass; `Problem.signals` has one row for each."""
        return ()

    @property
    def needs(self) -> frozenset[str]:
        """What else of a `Problem` must be filled: nats, from a pass back through the model; scores, from a pruner that
        has them."""
        return frozenset()

    @property
    def asks(self) -> bool:
        """Whether its searches ask. Those of one that reads all it needs in the `Problem` answer at once; then no token
        is sent through the model for them, and no candidates are made but those that are carried."""
        return True

    @abstractmethod
    def search(self, problem: Problem) -> Search:
        """Ask with `losses = yield queries`; questions are feasible or probes, the answer is feasible; where it `asks`,
        ask once."""

    def learn(self, searches: Sequence[Searched], folder: Path) -> None:
        """Save what answers other budgets without a search, as `learnt.safetensors` and `learnt.json`.

        Args:
            searches: of this allocator, under several budgets, ascending.
            folder: an empty one; the user names it in an option of the allocator.

        Raises:
            WrongInput: it cannot; here always.
        """
        raise WrongInput(f"{type(self).__name__} does not learn from its searches; take an allocator that does")

    def ready(self) -> None:
        """Raise WrongInput for what the search needs and this machine lacks; called before any long work."""
        return  # most need nothing

    def first_space(self, whole: Space) -> Space:
        """The ladders to begin with, given the space of every count: all counts on a grid of 1/16."""
        return whole.zoomed(whole.uniform(), stride=1 / 16, reach=16)

    def next_space(self, space: Space, best: Allocation) -> Space | None:
        """Finer ladders around the answer, to be pruned and searched again; None: done."""
        return None

    def last_space(self, whole: Space, best: Allocation) -> Space:
        """What is built, one rung per site: the answer, and what coarse rungs left of the budget spent."""
        return whole.zoomed(whole.nearest(best), reach=0)


@dataclass(frozen=True)
class NoAllocator(Allocator):
    """Stands where a learner decides: it reads nothing, asks nothing, and has one rung, for plans."""

    @property
    def asks(self) -> bool:
        return False

    def first_space(self, whole: Space) -> Space:
        return whole.zoomed(whole.uniform(), reach=0)

    def search(self, problem: Problem) -> Search:
        yield from ()
        return problem.start
