"""How much of the text comes from which data set, while something is trained on all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit import GateProblem

HALVINGS = 100  # of an interval: more than float64 can tell apart
POINTS = 10  # losses of a data set below which no curve is fitted
MOVES = 0.1  # of a moving mean, to what is new


class Draws:
    """Windows by data set, each in its turn, and what their losses have been: a moving mean of every data set."""

    def __init__(self, problem: GateProblem, rng: torch.Generator) -> None:
        self.rng, self.domains = rng, problem.domains
        self._of = {i: n for n, windows in enumerate(self.domains) for i in windows}
        self._ahead: list[list[int]] = [[] for _ in self.domains]
        self._means: list[float | None] = [None] * len(self.domains)

    def even(self, count: int) -> tuple[int, ...]:
        """So many windows, of all data sets alike."""
        longest = max(map(len, self.domains))
        dealt = (windows[i] for i in range(longest) for windows in self.domains if i < len(windows))
        return tuple(dealt)[:count]

    def draw(self, weights: Sequence[float], count: int) -> tuple[int, ...]:
        """So many windows, of data sets that are drawn by their weights."""
        chances = torch.tensor(weights, dtype=torch.float64)
        found = []
        for domain in torch.multinomial(chances, count, replacement=True, generator=self.rng).tolist():
            if not (ahead := self._ahead[domain]):
                windows = self.domains[domain]
                ahead += [windows[i] for i in torch.randperm(len(windows), generator=self.rng).tolist()]
            found.append(ahead.pop())
        return tuple(found)

    def means(self, windows: Sequence[int], losses: Tensor) -> list[float]:
        """Of the losses of some windows, by data set; of those of which there are none, the mean of all."""
        by = [
            [float(x) for i, x in zip(windows, losses, strict=True) if self._of[i] == n]
            for n in range(len(self._ahead))
        ]
        return [sum(some) / len(some) if some else float(losses.mean()) for some in by]

    def heard(self, windows: Sequence[int], losses: Tensor) -> None:
        """Move the means by what some windows have lost."""
        there = {self._of[i] for i in windows}
        for n, loss in enumerate(self.means(windows, losses)):
            if n in there:
                before = self._means[n]
                self._means[n] = loss if before is None else (1 - MOVES) * before + MOVES * loss

    @property
    def lost(self) -> list[float]:
        """The moving means; of a data set that was not drawn yet, the mean of the others."""
        known = [mean for mean in self._means if mean is not None]
        return [sum(known) / len(known) if mean is None else mean for mean in self._means]


@dataclass(eq=False)
class DynamicLoading:
    """Data sets that are farther above their reference than others get more.

        w ← softmax(log w + η (ℓ - ℓ_ref)),   w ← (1 - c) w + c / n             (1)

    Source: Sheared LLaMA (arXiv 2310.06694), after DoReMi (arXiv 2305.10429): η 1, c 1e-4. Its references are those
    that a scaling law over models of other sizes predicts; these are the dense model's own losses. Losses are moving
    means of what is learned from, where the paper evaluates on text of its own.
    """

    reference: list[float]
    weights: list[float]
    eta: float = 1.0
    smoothing: float = 1e-4  # c

    def heard(self, losses: list[float], progress: float, kept: float) -> None:
        score = [
            math.log(w) + self.eta * (loss - ref)
            for w, loss, ref in zip(self.weights, losses, self.reference, strict=True)
        ]
        raised = torch.softmax(torch.tensor(score, dtype=torch.float64), 0).tolist()
        n = len(raised)
        self.weights = [(1 - self.smoothing) * w + self.smoothing / n for w in raised]  # (1)


@dataclass(eq=False)
class RobustLoading:
    """The weights under which the losses above their references are worst, near to a mixture that follows them.

        q = arg max Σ q_i excess_i   s.t.  ½ Σ p_i (q_i / p_i - 1)² ≤ ρ,  q_i ≥ least · p_i           (1)
        p ← 0.9 p + 0.1 q, within p_0 / 2 … 2 p_0, from a fifth of the steps on                      (2)
        ℓ = A T^-β s^-κ + E, fitted to the losses so far: T the share of all steps, s what is kept     (3)

    The reference of a data set is what (3) foretells for the end, at most the lowest loss so far, and never rises;
    below `POINTS` losses the dense model's own. Where every loss is below its reference they are lowered by tenths.

    Source: DRPruning (arXiv 2411.14055) and its released code: ρ 0.1, 0.05 by default, least 0.2, moving means of
    losses by 0.1, (3) by L-BFGS on a Huber loss of 1e-3 from a grid of starts, the mean of the best three, s the share
    that is gone. We differ: (3) is fitted for every pair of exponents of a grid, where A and E follow by least squares,
    so that no start decides, and s is what is kept, which has a logarithm from the first step on. The code then raises
    every q_i to the least p, which its problem does not ask for, and holds p between the least and the largest p_0, so
    that it never moves where all are alike; neither is done here. In the code the fitted references never arrive: the
    callback reads an attribute that its constructor does not set.
    """

    reference: list[float]
    weights: list[float]
    target: float  # the share that is kept in the end
    rho: float = 0.1  # ρ
    least: float = 0.2  # of p_i
    fit: bool = True  # whether references become those of (3)
    base: list[float] = field(default_factory=list)  # p
    history: list[tuple[float, float, list[float]]] = field(default_factory=list)  # T, s, losses

    def __post_init__(self) -> None:
        self.base, self._first = list(self.weights), list(self.weights)

    def heard(self, losses: list[float], progress: float, kept: float) -> None:
        self.history.append((progress, kept, losses))
        if self.fit and len(self.history) >= POINTS:
            self._foretell()
        self.weights = worst(self.base, excess(losses, self.reference), self.rho, self.least)
        if progress >= 0.2:  # (2)
            mixed = [0.9 * p + 0.1 * q for p, q in zip(self.base, self.weights, strict=True)]
            held = [min(max(p, own / 2), 2 * own) for p, own in zip(mixed, self._first, strict=True)]
            self.base = [p / sum(held) for p in held]

    def _foretell(self) -> None:
        at = torch.tensor([[t, s] for t, s, _ in self.history], dtype=torch.float64)
        for i in range(len(self.reference)):
            seen = torch.tensor([losses[i] for _, _, losses in self.history], dtype=torch.float64)
            found = min(foretold(at, seen, (1.0, self.target)), float(seen.min()))
            first = len(self.history) == POINTS  # what the dense model has is no longer the measure
            self.reference[i] = found if first else min(found, self.reference[i])


def excess(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """How far losses are above references, which are lowered by tenths until one is."""
    found = [loss - ref for loss, ref in zip(losses, reference, strict=True)]
    for tenths in range(9, -1, -1):
        if max(found) >= 0:
            break
        found = [loss - ref * tenths / 10 for loss, ref in zip(losses, reference, strict=True)]
    return found


def worst(p: Sequence[float], above: Sequence[float], rho: float, least: float = 0.0) -> list[float]:
    """(1) of `RobustLoading`: q_i = p_i max(relu(above_i - η) / Z, least), scaled to 1, η by bisection."""
    top, spread = max(above), max(above) - min(above)
    if rho <= 0 or spread <= 1e-12 * (1 + abs(top)):
        return list(p)

    def at(eta: float) -> list[float]:
        raised = [max(each - eta, 0.0) for each in above]
        total = sum(x * r for x, r in zip(p, raised, strict=True))
        q = [x * max(r / total, least) for x, r in zip(p, raised, strict=True)]
        return [x / sum(q) for x in q]

    def far(q: Sequence[float]) -> float:
        return sum(x * (y / x - 1) ** 2 for x, y in zip(p, q, strict=True)) / 2 - rho

    low, up = top - 8 * spread, top - 1e-9 * spread  # below all; only the worst is left
    while far(at(low)) > 0:
        low -= 2 * (top - low)
    if far(at(up)) <= 0:  # even the worst alone is near enough
        return at(up)
    for _ in range(HALVINGS):
        middle = (low + up) / 2
        low, up = (low, middle) if far(at(middle)) > 0 else (middle, up)
    return at(low)


def foretold(at: Tensor, losses: Tensor, end: tuple[float, float]) -> float:
    """(3) of `RobustLoading` at the end: the mean of the three best fits over a grid of exponents.

    Args:
        at: (points, 2): share of all steps, share that is kept.
        losses: (points,), nats per token.
        end: where it is asked.
    """
    beta, kappa = torch.cartesian_prod(torch.arange(0, 21).double() / 20, torch.arange(-10, 11).double() / 10).unbind(1)
    x = torch.exp(-torch.outer(beta, at[:, 0].log()) - torch.outer(kappa, at[:, 1].log()))  # (grid, points)
    asked = torch.exp(-beta * math.log(end[0]) - kappa * math.log(end[1]))
    spread = (x - x.mean(1, keepdim=True)).square().mean(1)
    joint = ((x - x.mean(1, keepdim=True)) * (losses - losses.mean())).mean(1)
    a = (joint / spread.clamp_min(1e-30)).clamp_min(0)  # A and E by least squares, neither below 0
    e = losses.mean() - a * x.mean(1)
    alone = ((x * losses).mean(1) / x.square().mean(1)).clamp_min(0)
    a, e = torch.where(e < 0, alone, a), e.clamp_min(0)
    left = (a[:, None] * x + e[:, None] - losses).square().mean(1)
    best = torch.sort(left, stable=True).indices[:3]
    return float((a * asked + e)[best].mean())
