"""Tables for additive methods: layer errors as they come, or what each site alone does to the objective; finals."""

import math
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from prunekit import Allocation, Problem, Query, Search, Space

Table = tuple[tuple[float, ...], ...]
Source = Literal["errors", "probes", "fisher"]
"""The layers' output errors; what single changes do to the objective; or what rungs cost in nats, of `Problem.nats`."""
Asking = Generator[Sequence[Query], Sequence[float], Table]


@dataclass(frozen=True)
class Probes:
    """The objective's own table: change one site of a centre, ask, put it back.

        t_i(k) = J(centre with k groups at site i) - J(centre)                                 (1)

    is asked at `points` counts on either side of the centre, up to `reach` away and as far as the ladder goes. Between
    and beyond them it follows the site's error curve e_i:

        t_i(k) = t_i(a) + (t_i(b) - t_i(a)) (e_i(k) - e_i(a)) / (e_i(b) - e_i(a))              (2)

    with a, b the nearest counts known on both sides of k, or the last two. So a table costs two questions per site,
    where asking every rung would cost sixteen. A site must not gain from losing groups: a curve that rises with the
    count, by noise or where a loss failed, is levelled.
    """

    reach: float = 0.25  # farthest change, share of a site's groups
    points: int = 1  # counts asked on either side of the centre
    tokens: int = 4_096  # to judge a probe on

    def __post_init__(self) -> None:
        if min(self.points, self.tokens) < 1 or not 0 < self.reach <= 1:
            raise ValueError("points and tokens are at least 1, reach is in 0..1")

    def table(self, problem: Problem, centre: Allocation) -> Asking:
        """Ask around a centre, which may be dense; return t_i at every rung."""
        changes = [(i, kept) for i, middle in enumerate(centre) for kept in self._counts(problem, i, middle)]
        around = [centre, *((*centre[:i], kept, *centre[i + 1 :]) for i, kept in changes)]
        base, *losses = yield [Query(a, min(self.tokens, problem.tokens) or None, probe=True) for a in around]
        known = [{middle: 0.0} for middle in centre]
        if math.isfinite(base):
            rises = [loss - base for loss in losses]
            worst = min(1e3 * max((abs(x) for x in rises if math.isfinite(x)), default=1.0), 1e200)  # of what failed
            for (i, kept), rise in zip(changes, rises, strict=True):
                known[i][kept] = max(min(rise, worst), -worst)
        return tuple(_along(problem, i, asked) for i, asked in enumerate(known))

    def _counts(self, problem: Problem, i: int, middle: int) -> list[int]:
        """The rungs nearest to the changes asked for, at least one on either side where there is one."""
        ladder, groups = problem.space.ladders[i], problem.space.sites[i].n_groups
        near = set()
        for side in ([k for k in ladder if k < middle], [k for k in ladder if k > middle]):
            for j in range(1, self.points + 1) if side else ():
                away = self.reach * groups * j / self.points
                near.add(min(side, key=lambda kept: abs(abs(kept - middle) - away)))
        return sorted(near)


def needed(source: str) -> frozenset[str]:
    """What of a `Problem` must be filled for a table."""
    return frozenset({"nats"} if source == "fisher" else ())


def told(problem: Problem, source: Source) -> Table:
    """The table that a problem holds already."""
    if source == "errors":
        return problem.errors
    assert problem.nats is not None
    return problem.nats


def started(problem: Problem, source: Source, tokens: int = 1_024) -> Asking:
    """The table a search begins from: it is told that, or asks for probes around the start."""
    if source != "probes":
        return told(problem, source)
    return (yield from Probes(tokens=tokens).table(problem, problem.start))


def judged_again(finalists: Sequence[Allocation], problem: Problem) -> Search:
    """The best of some allocations and the start, on all tokens."""
    several = list(dict.fromkeys([*finalists, problem.start]))
    losses = yield [Query(a) for a in several]
    return min(zip(losses, several, strict=True))[1]


def total(space: Space, table: Sequence[Sequence[float]], allocation: Allocation) -> float:
    """Σ_i table[i][r_i]."""
    return math.fsum(min(row[r], 1e300) for row, r in zip(table, space.rungs(allocation), strict=True))


def _along(problem: Problem, i: int, known: dict[int, float]) -> tuple[float, ...]:
    """(2) at every rung of site i."""
    ladder = problem.space.ladders[i]
    if len(known) == 1:
        return (0.0,) * len(ladder)  # nothing is known: one rung, or a centre that failed
    error = {problem.space.sites[i].n_groups: 0.0} | dict(zip(ladder, problem.errors[i], strict=True))
    low, span = min(error.values()), max(error.values()) - min(error.values()) or 1.0
    x, behind = {}, -1.0
    for kept in sorted(error, reverse=True):
        x[kept] = behind = max((error[kept] - low) / span, behind + 1e-6)  # strictly rising as groups go
    points, behind = [], -math.inf
    for kept in sorted(known, reverse=True):
        behind = max(known[kept], behind)
        points.append((x[kept], behind))
    return tuple(_line(points, x[kept]) for kept in ladder)


def _line(points: Sequence[tuple[float, float]], x: float) -> float:
    """The broken line through points of ascending x, its ends prolonged."""
    j = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (xa, ta), (xb, tb) = points[j - 1 : j + 1]
    return ta + (tb - ta) * (x - xa) / (xb - xa)
