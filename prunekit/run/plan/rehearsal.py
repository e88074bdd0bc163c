"""How much a search will ask, counted by holding it on a stand-in table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from prunekit.plugins.allocator import Allocator, Journal, Problem, Query
from prunekit.search.conversation import Known
from prunekit.search.probing import Spent, Tally
from prunekit.space.ladders import Space

PATIENCE = 2000  # questions that a search is rehearsed for; those of the presets ask some hundred


def list_passes(allocator: Allocator, whole: Space) -> list[Space]:
    """The spaces of a search whose answers stay in the middle, and the one that is built in the end."""
    spaces = [allocator.first_space(whole)]
    while len(spaces) < 32:
        centre = spaces[-1].nearest(whole.uniform())
        if (finer := allocator.next_space(spaces[-1], centre)) is None:
            break
        spaces.append(finer)
    return [*spaces, allocator.last_space(whole, spaces[-1].nearest(whole.uniform()))]


@dataclass(frozen=True)
class Rehearsal:
    """What a search asks; None: it cannot be known, or a rehearsal was not asked for."""

    forwards: int | None = None  # tokens of all questions, those of every allocation counted
    allocations: int | None = None  # in one ask at most
    together: int | None = None  # tokens of the allocations that one ask has on the same tokens, at most
    rungs: frozenset[tuple[int, int]] | None = None  # (site, count) of all allocations
    least: int | None = None  # forwards when nothing the search finds is better than what it begins with
    most: int | None = None  # and when everything is better than all before
    spent: Spent | None = None  # where the limit ends it


Luck = Literal["some", "none", "all"]
"""Losses of a rehearsal: of a table; the same for every allocation; lower with every question."""


class _AskedElsewhere(Exception):
    """A search wants to know what only the run will ask of the outside world."""


class _Mute(Journal):
    """What asks the outside world is not rehearsed."""

    def once(self, question: Mapping[str, Any], answer: Any) -> Any:
        raise _AskedElsewhere


def rehearsed(
    allocator: Allocator,
    space: Space,
    tokens: int,
    seqlen: int,
    limit: int | None = None,
    known: Known | None = None,
    patience: float = PATIENCE,
    luck: Luck = "some",
    training: Callable[[int], int] = lambda _: 0,
) -> Rehearsal:
    """What a search will ask, counted by holding it on a stand-in table.

    Losses are additive in errors that fall with the square of what is removed. A search that goes on until it is
    content may ask more or less of a real model: `between` says how much.

    Args:
        allocator: whose search is held.
        space: what it searches.
        tokens: of the search text.
        seqlen: tokens in a window.
        limit: token-forwards at most; None: as many as it asks.
        known: losses that are free, learnt from another search; what is learnt is added.
        patience: questions at most, those that are asked again counted too; a search that asks more is not known.
        luck: what it finds.
        training: token-forwards beside those of a question on so many tokens.

    Raises:
        Exception: whatever the allocator raises, WrongInput where it refuses what it is asked.
    """
    errors = tuple(
        tuple((1 + i % 3) * (1 - kept / site.n_groups) ** 2 for kept in ladder)
        for i, (site, ladder) in enumerate(zip(space.sites, space.ladders, strict=True))
    )
    scores = tuple(tuple(float((7 * g) % 11) for g in range(site.n_groups)) for site in space.sites)
    signals = tuple(tuple(1.0 + (i % 5) / 10 for i in range(len(space.sites))) for _ in allocator.signals)
    start, judged, paid = space.nearest(space.uniform()), {} if known is None else known, 0
    problem = Problem(space, errors, start, 0, tokens, signals, scores, nats=errors, journal=_Mute())
    allocations = together = questions = 0
    tally = Tally()
    rungs: set[tuple[int, int]] = set()

    def loss(query: Query) -> float:
        if luck != "some":
            return 1.0 if luck == "none" else -float(len(judged))
        return sum(
            (1 + i % 3) * (1 - kept / site.n_groups) ** 2
            for i, (site, kept) in enumerate(zip(space.sites, query.allocation, strict=True))
        )

    try:
        search = allocator.search(problem)
        queries = next(search)
        while True:
            asked = [
                (q.allocation, tokens if q.tokens is None else min(tokens, max(1, q.tokens // seqlen) * seqlen))
                for q in queries
            ]
            new = Counter(count for key, count in dict.fromkeys((k, k[1]) for k in asked) if key not in judged)
            price = sum((count + training(count)) * times for count, times in new.items())
            if limit is not None and paid + price > limit:
                return Rehearsal(limit, allocations, together, frozenset(rungs), spent=tally.ended(limit, price))
            paid += price
            fresh = {key: key[1] + training(key[1]) for key in asked if key not in judged}
            tally.count({key for key, query in zip(asked, queries, strict=True) if query.probe}, fresh, fresh)
            questions += len(asked)
            if questions > patience:
                return Rehearsal()
            allocations = max([allocations, *new.values()])
            together = max([together, *(count * times for count, times in new.items())])
            rungs.update(rung for query in queries for rung in enumerate(query.allocation))
            for key, query in zip(asked, queries, strict=True):
                judged[key] = judged[key] if key in judged else loss(query)
            queries = search.send([judged[key] for key in asked])
    except StopIteration:
        return Rehearsal(paid, allocations, together, frozenset(rungs))
    except _AskedElsewhere:
        return Rehearsal()


def foresee_limit(
    allocator: Allocator, whole: Space, tokens: int, seqlen: int, limit: int, training: Callable[[int], int]
) -> Spent | None:
    """Where a limit on all passes of a search will end it; None: nowhere, or that cannot be known.

    Args:
        allocator: whose search is held.
        whole: space of every count.
        tokens: of the search text.
        seqlen: tokens in a window.
        limit: token-forwards of all passes together.
        training: token-forwards beside those of a question on so many tokens.
    """
    left = limit
    for space in list_passes(allocator, whole)[:-1]:
        found = rehearsed(allocator, space, tokens, seqlen, left, training=training)
        if found.spent is not None:
            return found.spent if left == limit else None  # a later pass: then there was a search
        if found.forwards is None:
            return None
        left -= found.forwards
    return None


def between(likely: Rehearsal, *question: Any, training: Callable[[int], int] = lambda _: 0) -> Rehearsal:
    """With the least and the most that a search may ask; `question` as of `rehearsed`."""
    if likely.forwards is None:
        return likely
    ends = [rehearsed(*question, luck=luck, training=training).forwards for luck in ("none", "all")]
    known = [likely.forwards, *(forwards for forwards in ends if forwards is not None)]
    return replace(likely, least=min(known), most=max(known))
