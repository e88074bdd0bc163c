"""Whether one method is better than another: paired intervals, corrected for many comparisons, and mean ranks.

Losses are of the same windows of text for every method, so differences are paired by window. Windows and seeds are both
samples: the intervals draw both anew. What is not separated by more than that is called a tie, never a winner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4_000
FEW = 10  # resamples beyond 0 that are counted; a rarer chance is that of a t distribution of their spread
LEVEL = 0.95  # of intervals, and one minus it of tests
Losses = NDArray[np.float64]
"""(seeds, windows): nats per target of every window."""


@dataclass(frozen=True)
class Difference:
    """How far one method's mean loss is above another's, in nats per token: the log of the ratio of perplexities."""

    mean: float
    low: float  # of the interval that holds it with probability `LEVEL`
    high: float
    p: float  # that a difference so far from 0 comes by chance, two-sided


@dataclass(frozen=True)
class Standing:
    """A method among others, on one model at one sparsity."""

    name: str
    loss: float  # mean over seeds and windows
    spread: float  # half the distance between the extremes of the seeds
    above_best: Difference  # 0 for the best itself
    tied: bool  # whether its difference from the best is within noise
    above_reference: Difference | None  # of the method that all are compared with


@dataclass(frozen=True)
class Ranks:
    """Mean ranks over models and sparsities, 1 the best; ties share theirs."""

    mean: Mapping[str, float]
    blocks: int
    p: float  # Friedman's: that all methods are alike
    critical: float  # mean ranks that differ by less are not separated (Nemenyi)


def difference(a: Losses, b: Losses, seed: int = 0) -> Difference:
    """Compare two methods on the same windows.

    Windows are drawn anew for both together and seeds for each alone, with replacement (the pigeonhole bootstrap of
    Owen, 2007, arXiv 0712.1111, for two factors): the interval is wide enough for both, and for few seeds too wide.

    Args:
        a: losses of the one, (seeds, windows).
        b: of the other, of as many windows; its seeds may be fewer.
        seed: of the draws.

    Returns:
        How far `a` is above `b`; an infinite loss makes an infinite difference and no interval.

    Raises:
        ValueError: the windows are not the same number, or there are none.
    """
    if a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise ValueError(f"losses of {a.shape[1]} and {b.shape[1]} windows cannot be paired")
    mean = float(a.mean() - b.mean()) if np.isfinite(a).all() or np.isfinite(b).all() else math.nan
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Difference(mean, math.nan, math.nan, math.nan)
    rng, windows = np.random.default_rng(seed), a.shape[1]
    weights = rng.multinomial(windows, [1 / windows] * windows, RESAMPLES) / windows  # (resamples, windows)

    def drawn(losses: Losses) -> NDArray[np.float64]:
        seeds = len(losses)
        lots = rng.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) / seeds
        return np.einsum("rs,sw,rw->r", lots, losses, weights, optimize=True)

    found = drawn(a) - drawn(b)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p = 1.0 if np.array_equal(a.mean(0), b.mean(0)) else _chance(found, mean, windows)
    return Difference(mean, float(low), float(high), p)


def _chance(drawn: NDArray[np.float64], mean: float, windows: int) -> float:
    """That a difference so far from 0 comes by chance, two-sided.

    Counts end at one of all resamples, of which a correction for hundreds of comparisons makes a tie of any two
    methods. Beyond what can be counted it is the tail of Student's t with the resamples' spread and the degrees of
    freedom of the windows.

    Raises:
        ImportError: scipy is not installed.
    """
    if windows == 1:
        return 1.0
    beyond = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    if beyond >= FEW:
        return min(1.0, 2 * (1 + beyond) / (1 + RESAMPLES))
    from scipy.stats import t

    spread = float(drawn.std())
    return 0.0 if spread == 0 else float(2 * t.sf(abs(mean) / spread, windows - 1))


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values of comparisons that are read together (Holm, 1979); NaN stays, and counts for nothing."""
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    found, running = [math.nan] * len(p), 0.0
    for order, (value, i) in enumerate(known):
        running = max(running, min(1.0, (len(known) - order) * value))
        found[i] = running
    return found


def standings(losses: Mapping[str, Losses], reference: str | None = None) -> list[Standing]:
    """Order methods by their mean loss, and say which of them the best is not separated from.

    Args:
        losses: of every method on the same windows, (seeds, windows).
        reference: a method that all are compared with as well, if it is there.

    Returns:
        The best first; those without a finite loss last. Tests against the best are corrected by Holm.
    """
    means = {name: float(each.mean()) if np.isfinite(each).all() else math.inf for name, each in losses.items()}
    order = sorted(losses, key=lambda name: (means[name], name))
    best = order[0]
    above = {name: difference(losses[name], losses[best]) for name in order}
    corrected = dict(zip(order[1:], holm([above[name].p for name in order[1:]]), strict=True))
    rows, other = list[Standing](), None if reference is None else losses.get(reference)
    for name in order:
        seeds = losses[name].mean(1)
        rows.append(
            Standing(
                name,
                means[name],
                float(seeds.max() - seeds.min()) / 2 if math.isfinite(means[name]) else math.nan,
                above[name],
                name == best or corrected[name] >= 1 - LEVEL,
                None if other is None else difference(losses[name], other),
            )
        )
    return rows


def ranks(blocks: Sequence[Mapping[str, float]]) -> Ranks | None:
    """Rank methods in every block, a model at a sparsity, and average (Demsar, 2006, JMLR 7).

    Args:
        blocks: loss by method, averaged over seeds: the test takes blocks for independent, and seeds on the same model
            and text are not; methods that are not in all of them are left out.

    Returns:
        None: fewer than two blocks or three methods have no ranks to compare.

    Raises:
        ImportError: scipy is not installed.
    """
    names = [name for name in (blocks[0] if blocks else {}) if all(name in block for block in blocks)]
    if len(blocks) < 2 or len(names) < 3:
        return None
    from scipy import stats

    table = np.array([[block[name] for name in names] for block in blocks])
    ranked = stats.rankdata(np.where(np.isfinite(table), table, np.inf), axis=1)
    n, k = ranked.shape
    critical = float(stats.studentized_range.ppf(LEVEL, k, np.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
    alike = bool((ranked == ranked[:, :1]).all())
    p = 1.0 if alike else float(stats.friedmanchisquare(*ranked.T).pvalue)
    return Ranks(dict(zip(names, ranked.mean(0).tolist(), strict=True)), n, p, critical)
