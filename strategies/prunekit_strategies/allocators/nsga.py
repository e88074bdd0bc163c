"""NSGA-II in level space: a population that keeps the whole front between two aims."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, check_choices
from prunekit_strategies.allocators.probes import Source, judged_again, needed, started

Against = Literal["price", "error"]
Aims = Mapping[Allocation, tuple[float, float]]


@dataclass(frozen=True)
class NSGA(Allocator):
    """Evolve allocations towards the front of two aims, both to be small: the loss, and the price or the table's error.

    Genes are rungs. A child takes every gene from one of two parents (uniform crossover), each parent the winner of a
    tournament of two on (rank, crowding); then each gene moves one rung up or down with probability `mutation`. Of
    parents and children together the first fronts survive, the last of them by crowding:

        crowding_a = Σ_m (f_m(next) - f_m(before)) / (max f_m - min f_m),   ∞ at the ends      (1)

    `against: price` lets prices range within `window` of the budget; allocations above it are probes. The front is a
    curve of sizes, and in the ledger for later; answers to this budget come from its members, each rounded to it.
    `against: error` repairs every child to the budget; the second aim is the sum of the error table, which knows more
    tokens than a search can pay: the front holds those that are good on few tokens because they are good.

    Source: Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 6(2), 2002, sections
    III A to C; the idea for pruning from OptiShear (Liu et al., arXiv:2502.10735), which evolves metrics and ratios
    against |sparsity - target|. Ours are the genes, the exact budget and the seeds.
    """

    against: Against = "error"
    population: int = 16
    generations: int = 12
    tokens: int = 4_096  # to judge a member on
    finalists: int = 4  # judged again on all tokens
    window: float = 0.1  # how far prices stray from the budget, share of it
    mutation: float | None = None  # probability that a gene moves; None: one gene per child
    warm_start: Source = "probes"  # the table whose optimum is in the first generation, with the start

    def __post_init__(self) -> None:
        check_choices(self)
        if self.population < 4 or min(self.generations, self.tokens, self.finalists) < 1:
            raise ValueError("a population has at least 4 members; generations, tokens and finalists are at least 1")
        if not 0 < self.window < 1 or (self.mutation is not None and not 0 <= self.mutation <= 1):
            raise ValueError("window is in 0..1, mutation in 0..1")

    @property
    def needs(self) -> frozenset[str]:
        return needed(self.warm_start)

    def search(self, problem: Problem) -> Search:
        space, rng = problem.space, random.Random(problem.seed)
        tokens = min(self.tokens, problem.tokens) or None
        aims: dict[Allocation, tuple[float, float]] = {}
        members: list[Allocation] = []
        table = yield from started(problem, self.warm_start)
        seeds = [problem.start, space.lowest(table)]
        for generation in range(self.generations + 1):
            new = self._children(problem, members, aims, rng) if generation else self._first(space, seeds, rng)
            if not new:
                break
            losses = yield [Query(a, tokens, probe=True) for a in new]
            aims |= {a: (loss, self._second(problem, a)) for a, loss in zip(new, losses, strict=True)}
            members = survivors([*members, *new], aims, self.population)

        front = [a for a in ranked(members, aims)[0] if math.isfinite(aims[a][0])]
        rounded = dict.fromkeys(space.nearest(a) for a in sorted(front, key=aims.__getitem__))
        if strangers := [a for a in rounded if a not in aims]:
            losses = yield [Query(a, tokens) for a in strangers]
            aims |= {a: (loss, 0.0) for a, loss in zip(strangers, losses, strict=True)}
        return (yield from judged_again(sorted(rounded, key=lambda a: aims[a][0])[: self.finalists], problem))

    def _second(self, problem: Problem, allocation: Allocation) -> float:
        if self.against == "price":
            return float(problem.space.cost(allocation))
        return math.fsum(problem.error(i, kept) for i, kept in enumerate(allocation))

    def _first(self, space: Space, seeds: Sequence[Allocation], rng: random.Random) -> list[Allocation]:
        """The seeds, and what mutation makes of them."""
        found = dict.fromkeys(seeds)
        for _ in range(10 * self.population):
            if len(found) >= self.population:
                break
            found[self._repaired(space, self._mutated(space, rng.choice(seeds), 0.5, rng))] = None
        return list(found)

    def _children(
        self,
        problem: Problem,
        members: Sequence[Allocation],
        aims: Aims,
        rng: random.Random,
    ) -> list[Allocation]:
        """As many children as there are members, none of them judged before."""
        space, chance = problem.space, self.mutation
        chance = 1 / len(space.sites) if chance is None else chance
        order = {a: place for place, a in enumerate(survivors(members, aims, len(members)))}
        children: dict[Allocation, None] = {}
        for _ in range(10 * self.population):
            if len(children) == self.population:
                break
            mother, father = (min(rng.choices(members, k=2), key=order.__getitem__) for _ in range(2))
            mixed = tuple(rng.choice(genes) for genes in zip(mother, father, strict=True))
            child = self._repaired(space, self._mutated(space, mixed, chance, rng))
            if child not in aims:
                children[child] = None
        return list(children)

    def _mutated(self, space: Space, allocation: Allocation, chance: float, rng: random.Random) -> Allocation:
        rungs = [
            min(max(r + rng.choice((-1, 1)) * (rng.random() < chance), 0), len(ladder) - 1)
            for r, ladder in zip(space.rungs(allocation), space.ladders, strict=True)
        ]
        return space.allocation(rungs)

    def _repaired(self, space: Space, allocation: Allocation) -> Allocation:
        """Within the window of prices, or exactly on the budget."""
        if self.against == "error":
            return space.nearest(allocation)
        limit = space.budget.limit
        low, high = (1 - self.window) * limit, (1 + self.window) * limit
        return allocation if low <= space.cost(allocation) <= high else space.nearest(allocation)


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Nowhere worse and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def ranked(members: Sequence[Allocation], aims: Aims) -> list[list[Allocation]]:
    """The fronts: those nobody dominates, then those nobody else dominates, and so on."""
    fronts, left = [], list(dict.fromkeys(members))
    while left:
        front = [a for a in left if not any(dominates(aims[b], aims[a]) for b in left)]
        fronts.append(front)
        left = [a for a in left if a not in set(front)]
    return fronts


def crowding(front: Sequence[Allocation], aims: Aims) -> dict[Allocation, float]:
    """(1); infinite for the ends of each aim."""
    distance = dict.fromkeys(front, 0.0)
    for m in range(2):
        order = sorted(front, key=lambda a: aims[a][m])
        low, high = aims[order[0]][m], aims[order[-1]][m]
        distance[order[0]] = distance[order[-1]] = math.inf
        if math.isfinite(high - low) and high > low:
            for before, a, after in zip(order, order[1:], order[2:], strict=False):
                distance[a] += (aims[after][m] - aims[before][m]) / (high - low)  # (1)
    return distance


def survivors(members: Sequence[Allocation], aims: Aims, count: int) -> list[Allocation]:
    """The best `count` by (rank, crowding), best first."""
    chosen: list[Allocation] = []
    for front in ranked(members, aims):
        distance = crowding(front, aims)
        chosen += sorted(front, key=lambda a: -distance[a])
    return chosen[:count]
