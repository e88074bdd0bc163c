"""Policy gradient over rungs: learn a distribution over allocations from losses alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, check_choices
from prunekit_strategies.allocators.probes import Source, judged_again, needed, started

Rows = list[np.ndarray]  # one array per site, one number per rung


@dataclass(frozen=True)
class PolicyGradient(Allocator):
    """Draw allocations from a distribution with one logit per rung; make rungs of low loss likelier.

        π_i = softmax(θ_i - λ p_i)   with λ such that the expected price is the budget         (1)
        r^k ~ π,   ℓ_k = J(the allocation nearest to r^k that spends the budget)              (2)
        A_k = ℓ_k - Σ_{j≠k} ℓ_j / (K - 1)                                                      (3)
        θ_i ← θ_i - rate (1/K Σ_k A_k / s (onehot(r_i^k) - π_i) - entropy ∇H(π_i))             (4)

    over sites i, with p_i the prices of the rungs as shares of the partition and s the range of the first losses. (3)
    makes the mean in (4) an unbiased estimate of the gradient of E ℓ with respect to the logits, whatever J is. θ
    starts as a bell of `width` around the optimum of a table (see Probes). The best few draws and the start are judged
    again on all tokens: the answer is the best allocation met, not the likeliest.

    Derived: the score-function estimate of a categorical distribution over rungs, with the other draws as the baseline
    and prices in (1). A probability for every single group is learned by learner `bypass-bp`.
    """

    steps: int = 20
    draws: int = 8  # K, allocations per step
    tokens: int = 4_096  # to judge a draw on
    finalists: int = 4  # draws judged again on all tokens
    rate: float = 0.5  # step size in logits, for advantages in units of s
    entropy: float = 0.01  # weight of the entropy
    width: float = 0.1  # standard deviation of the first distribution, share of a site's groups
    warm_start: Source = "probes"  # the table whose optimum is the centre of the first distribution

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.steps, self.tokens, self.finalists) < 1 or self.draws < 2:
            raise ValueError(
                "steps, tokens and finalists are at least 1, draws at least 2: one is the other's baseline"
            )
        if not (self.rate > 0 and self.width > 0 and self.entropy >= 0):
            raise ValueError("rate and width are above 0, entropy is at least 0")

    @property
    def needs(self) -> frozenset[str]:
        return needed(self.warm_start)

    def search(self, problem: Problem) -> Search:
        space, rng = problem.space, np.random.default_rng(problem.seed)
        tokens = min(self.tokens, problem.tokens) or None
        table = yield from started(problem, self.warm_start)
        theta, scale = self._bell(space, space.lowest(table)), 0.0
        heard = dict(zip([problem.start], (yield [Query(problem.start, tokens)]), strict=True))
        for _ in range(self.steps):
            pi = shifted(theta, space)
            drawn = [[int(rng.choice(len(p), p=p)) for p in pi] for _ in range(self.draws)]  # (2)
            met = [space.nearest(space.allocation(rungs)) for rungs in drawn]
            if new := [a for a in dict.fromkeys(met) if a not in heard]:
                heard |= zip(new, (yield [Query(a, tokens) for a in new]), strict=True)
            losses = _finite([heard[a] for a in met])
            scale = scale or float(np.ptp(losses))
            if scale > 0:
                slope = gradient(pi, drawn, losses / scale)
                bonus = entropy_gradient(pi)
                theta = [t - self.rate * (g - self.entropy * h) for t, g, h in zip(theta, slope, bonus, strict=True)]
        return (yield from judged_again(sorted(heard, key=heard.__getitem__)[: self.finalists], problem))

    def _bell(self, space: Space, centre: Allocation) -> Rows:
        """Logits of a normal distribution of kept shares around a centre."""
        return [
            -0.5 * ((np.array(ladder) - kept) / (self.width * site.n_groups)) ** 2
            for ladder, kept, site in zip(space.ladders, centre, space.sites, strict=True)
        ]


def softmax(logits: np.ndarray) -> np.ndarray:
    """exp(x) / Σ exp(x)."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def shifted(theta: Rows, space: Space) -> Rows:
    """(1), partition by partition; as near as λ gets where the rungs cannot cost the budget."""
    pi = [softmax(t) for t in theta]
    for members, limit in space.partitions:
        prices = {i: np.array(space.prices[i]) / max(limit, 1) for i in members}

        def at(rise: float, prices: dict[int, np.ndarray] = prices) -> dict[int, np.ndarray]:
            return {i: softmax(theta[i] - rise * p) for i, p in prices.items()}

        low, high = -1e4, 1e4  # expected prices fall as λ rises
        for _ in range(60):
            middle = (low + high) / 2
            spent = sum(float(p @ prices[i]) for i, p in at(middle).items())
            low, high = (middle, high) if spent > 1 else (low, middle)
        for i, p in at(high).items():
            pi[i] = p
    return pi


def gradient(pi: Rows, drawn: Sequence[Sequence[int]], losses: np.ndarray) -> Rows:
    """(3) and the mean in (4): an unbiased estimate of dE[loss]/dθ from K independent draws of rungs."""
    advantages = (losses - losses.mean()) * len(losses) / (len(losses) - 1)  # same as: losses less the others' mean
    slope = [np.zeros_like(p) for p in pi]
    for rungs, a in zip(drawn, advantages, strict=True):
        for i, r in enumerate(rungs):
            slope[i][r] += a / len(losses)
            slope[i] -= a / len(losses) * pi[i]
    return slope


def entropy_gradient(pi: Rows) -> Rows:
    """dH/dθ = -π (log π + H)."""
    logs = [np.log(np.maximum(p, 1e-300)) for p in pi]
    return [-p * (log - float(p @ log)) for p, log in zip(pi, logs, strict=True)]


def _finite(losses: Sequence[float]) -> np.ndarray:
    """What failed as bad as the worst that did not, so that a step stays finite; zeros where all failed."""
    known = [x for x in losses if math.isfinite(x)]
    worst = max(known, default=0.0)
    return np.array([x if math.isfinite(x) else worst for x in losses])
