"""One additive table of all that searches under several budgets have judged; no allocator itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prunekit import Allocation, Searched, Space

Floats = NDArray[np.float64]

STEPS = 50  # of Gauss-Newton, at most
FAR = 2.0  # largest change of a logarithm in a step
MOST = 20.0  # largest logarithm
TRUSTS = tuple(10.0 ** (k / 4) for k in range(-16, 41))  # λ
WRONG = {True: 0.3, False: 2.0}  # largest deviation of a logarithm: of prices in nats, and of errors


@dataclass(frozen=True)
class FittedTable:
    """What every count of every site adds to the loss, in a unit of its own: only what is lower counts."""

    kept: Sequence[Sequence[int]]  # counts of every site, ascending
    losses: Sequence[Sequence[float]]  # of every count


def fitted(searches: Sequence[Searched]) -> FittedTable | None:
    """The table that the searches began from, every site's row bent until it agrees with what they have judged.

        log J(a) = c + γ log Σ_i t_i(a_i) exp(u_i + v_i (x_i - ½)) + ε,   x_i = 1 - a_i / n_i                (1)
        u_i, v_i, γ - 1 ~ N(0, λ σ²),   ε ~ N(0, σ² (J(a) / J_best)⁴)                           (2)

    with n_i groups of site i, a level c, without a prior, for every budget and number of tokens, and J_best the lowest
    loss of that level: what is far from the best tells little about it. The factors are those of a site, not of a
    budget, so that what was judged under one budget tells about all others.

    t is the price in nats where the searches were given it, which is right up to moderate factors: √λ σ is then at most
    0.3. Else it is the output error, which knows nothing of what is behind a site, and √λ σ is at most 2. (1) is met
    by Gauss-Newton steps, in each of which λ is that of greatest restricted likelihood.

    Source: ours. Ridge regression and its evidence are textbook (Bishop, Pattern Recognition and Machine Learning,
    2006, 3.54 and 3.86).

    Args:
        searches: under several budgets, of one model.

    Returns:
        None where there is nothing to fit: no search says what it was given, or a loss is not above zero, so that it
        has no logarithm.
    """
    rows = [row for number, each in enumerate(searches) for row in _judged(number, each)]
    levels = {level: i for i, level in enumerate(dict.fromkeys(level for level, *_ in rows))}
    if len(rows) <= len(levels) + 1 or min(loss for *_, loss in rows) <= 0:
        return None
    level = np.array([levels[key] for key, *_ in rows])
    t = np.array([terms for _, terms, _, _ in rows])  # (N, sites)
    x = np.array([shares for _, _, shares, _ in rows]) - 0.5
    losses = np.array([loss for *_, loss in rows])
    lowest = np.full(len(levels), np.inf)
    np.minimum.at(lowest, level, losses)
    exact = all(each.problem is None or each.problem.nats is not None for each in searches)
    u, v = _factors(level, t, x, np.log(losses), (lowest[level] / losses) ** 2, WRONG[exact])
    return _bent(searches, u, v)


def _judged(number: int, each: Searched) -> list[tuple[tuple[int, int], list[float], list[float], float]]:
    """(level, t_i(a_i), x_i, loss) of what was judged on the ladders of the last pass."""
    if each.problem is None:
        return []
    space, table = each.problem.space, _table(each)
    return [
        (
            (number, tokens),
            [row[r] for row, r in zip(table, space.rungs(allocation), strict=True)],
            [1 - kept / site.n_groups for kept, site in zip(allocation, space.sites, strict=True)],
            loss,
        )
        for (allocation, loss), tokens in zip(each.judged, each.tokens or [0] * len(each.judged), strict=True)
        if space.is_feasible(allocation) and math.isfinite(loss)
    ]


def _table(each: Searched) -> Sequence[Sequence[float]]:
    """What a search was given: prices in nats, or errors."""
    assert each.problem is not None
    table = each.problem.errors if each.problem.nats is None else each.problem.nats
    return [[min(max(value, 1e-12), 1e12) for value in row] for row in table]


def _factors(
    level: NDArray[np.int64], t: Floats, x: Floats, y: Floats, root: Floats, most: float
) -> tuple[Floats, Floats]:
    """u and v of (1), by site."""
    sites = t.shape[1]
    level_of = np.eye(level.max() + 1)[level]
    freedom = len(y) - level_of.shape[1]
    found = np.zeros(2 * sites + 1)  # u, v and γ - 1

    def without(values: Floats) -> Floats:
        """Values less the mean of their level; all of one noise."""
        weights = root**2
        sums = level_of.T @ (values.T * weights).T
        return ((values - level_of @ (sums.T / (level_of.T @ weights)).T).T * root).T

    for _ in range(STEPS):
        terms = t * np.exp(found[:sites] + found[sites:-1] * x)
        total = terms.sum(1)
        part = (1 + found[-1]) * terms / total[:, None]
        slopes = np.concatenate([part, part * x, np.log(total)[:, None]], 1)  # of (1) along what is found
        target = without(y - (1 + found[-1]) * np.log(total) + slopes @ found)
        left, d, right = np.linalg.svd(without(slopes), full_matrices=False)
        r = left.T @ target
        rest = max(float(target @ target - r @ r), 0.0) + 1e-12
        trust = _trust(d, r, rest, freedom, most)
        step = right.T @ (trust * d * r / (1 + trust * d**2)) - found
        away = float(np.abs(step).max())
        found = np.clip(found + step * min(1.0, FAR / max(away, 1e-12)), -MOST, MOST)
        found[-1] = max(found[-1], -0.9)  # more damage is never a lower loss
        if away < 1e-5:
            break
    return found[:sites], found[sites:-1]


def _trust(d: Floats, r: Floats, rest: float, freedom: int, most: float) -> float:
    """λ of greatest restricted likelihood, √λ σ at most `most`; d singular values, r the target's part along each."""
    found, best = TRUSTS[0], -math.inf
    for trust in TRUSTS:
        grown = 1 + trust * d**2
        variance = (float(np.sum(r**2 / grown)) + rest) / freedom  # σ²
        if trust * variance > most**2:
            break
        evidence = -(freedom * math.log(variance) + float(np.log(grown).sum())) / 2
        if evidence > best:
            found, best = trust, evidence
    return found


def _bent(searches: Sequence[Searched], u: Floats, v: Floats) -> FittedTable:
    """The table at every count that any search had on its ladders; no site gains from losing groups."""
    known: list[dict[int, float]] = [{} for _ in u]
    for each in searches:
        if each.problem is not None:
            for row, ladder, values in zip(known, each.problem.space.ladders, _table(each), strict=True):
                row.update(zip(ladder, values, strict=True))
    kept, losses = [], []
    for row, site, a, b in zip(known, searches[0].whole.sites, u, v, strict=True):
        counts = sorted(row)
        bent = [row[k] * math.exp(a + b * (0.5 - k / site.n_groups)) for k in counts]
        level = np.maximum.accumulate(bent[::-1])[::-1]
        kept.append(tuple(counts))
        losses.append(tuple(float(f"{value:.9g}") for value in level))  # so that machines agree
    return FittedTable(tuple(kept), tuple(losses))


def between(low: Space, high: Space, share: float) -> Space:
    """A space whose budget lies between those of two others, at a share of the way."""

    def on_the_way(a: int, b: int) -> int:
        return round(a + share * (b - a))

    kinds = zip(low.budget.by_kind, high.budget.by_kind, strict=True)
    by_kind = tuple((kind, on_the_way(a, b)) for (kind, a), (_, b) in kinds)
    limit = sum(n for _, n in by_kind) if by_kind else on_the_way(low.budget.limit, high.budget.limit)
    return replace(low, budget=replace(low.budget, limit=limit, by_kind=by_kind))


def optima(searches: Sequence[Searched], table: FittedTable, count: int) -> list[tuple[Space, Allocation]]:
    """The table's lowest allocations under so many budgets, evenly from the least that was searched to the largest."""
    spaces = sorted((each.whole for each in searches), key=lambda space: space.budget.limit)
    limits = [space.budget.limit for space in spaces]
    found = []
    for wanted in np.linspace(limits[0], limits[-1], count):
        i = min(max(int(np.searchsorted(limits, wanted)), 1), len(limits) - 1)
        share = (wanted - limits[i - 1]) / max(limits[i] - limits[i - 1], 1)
        whole = between(spaces[i - 1], spaces[i], float(share))
        space = replace(whole, ladders=tuple(map(tuple, table.kept)))
        found.append((whole, space.lowest(table.losses)))
    return found
