"""One parent, many children by small exchanges, ever fewer of them judged on ever more tokens."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, check_choices
from prunekit_strategies.allocators.probes import needed, started
from prunekit_strategies.allocators.surrogate import Judged, Screen, Surrogate, recorded

WarmStart = Literal["none", "errors", "probes", "fisher"]


@dataclass(frozen=True)
class Evolution(Allocator):
    """Mutate the parent by exchanging rungs; let the best child replace it when it is better in the last stage.

    A child is f exchanges away from the parent,

        f = min(U, U'),   U, U' ~ Uniform{1..exchanges}                                       (1)

    and a generation is a tournament: stage j judges what is left on T_j tokens and keeps the S_j best.
    The parent joins the last stage, so its loss never rises. Of `filter` times as many children as it judges, a
    generation takes those that a surrogate fitted to all judgements so far foretells to be good (see Screen).

    Source: EvoPress (Sieberling et al., arXiv:2410.14649, algorithms 1 and 2) and, for structures, Týr-the-Pruner
    (Li et al., arXiv:2503.09657). We differ: an exchange keeps the exact price, so sites of unequal price trade
    both ways; a child beaten in the last stage is not asked again; the optimum of a table is a second parent to
    start from, by default of a table of probes: on a language model of 16 sites at half its size, 33 probes of 1 Ki
    tokens led below what 12 generations reached from the error table, for a twentieth of the tokens; the search ends
    when the parent has met all its neighbours, or stands for `patience` generations; and a generation has fewer
    children and tokens: on additive toys with other weights than the table, a last stage of 16 Ki tokens found
    allocations as good as one of 64 Ki for a third of the tokens. With the filter the same language model at 30 % of
    its size came below the losses of 0.7 million token-forwards without after 0.2 to 0.3 million, on three seeds, and
    perplexity on other text was then 0.1 to 0.4 lower; at half its size after 0.4 million on two seeds of three, and
    perplexity on other text was the same.
    """

    generations: int = 50
    offspring: int = 8  # children per generation
    exchanges: int = 4  # most exchanges per child, a in (1)
    selections: tuple[tuple[int, int], ...] = ((4, 512), (2, 4_096), (1, 16_384))  # (survivors, tokens)
    patience: int = 15  # generations without a new parent before the search ends
    warm_start: WarmStart = "probes"  # the table whose lowest allocation competes with the start (see Probes)
    filter: int = 8  # children drawn for each one judged, of which a surrogate takes its choice; 1: no surrogate

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.offspring, self.exchanges, self.patience, self.filter) < 1 or self.generations < 0:
            raise ValueError("offspring, exchanges, patience and filter are at least 1, generations at least 0")
        survivors, tokens = [s for s, _ in self.selections], [t for _, t in self.selections]
        if survivors[-1:] != [1] or survivors != sorted(survivors, reverse=True):
            raise ValueError(f"survivors fall to 1 from stage to stage, not {survivors}")
        if tokens != sorted(tokens) or tokens[0] < 1:
            raise ValueError(f"tokens rise from stage to stage, not {tokens}")

    @property
    def needs(self) -> frozenset[str]:
        return needed(self.warm_start)

    def search(self, problem: Problem) -> Search:
        judged: Judged = {}
        return recorded(self._search(problem, judged), judged)

    def _search(self, problem: Problem, judged: Judged) -> Search:
        space, rng = problem.space, random.Random(problem.seed)
        stages = self._stages(problem.tokens)
        most = stages[-1][1]
        parents, table = [problem.start], problem.errors
        if self.warm_start != "none":
            table = yield from started(problem, self.warm_start)
            if (seed := space.lowest(table)) != problem.start:
                parents.append(seed)
        losses = yield [Query(a, most) for a in parents]
        _, parent = min(zip(losses, parents, strict=True))
        beaten = set(parents)  # in a last stage; a parent's loss only falls, so none of them can win again

        screen, idle = Screen(Surrogate(space, table)), 0
        for _ in range(self.generations):
            pool = self._children(space, parent, beaten, rng)
            if not pool or idle == self.patience:
                break
            if self.filter > 1:
                pool = screen.chosen(pool, self.offspring, beaten, judged)
            for survivors, tokens in stages[:-1]:
                losses = yield [Query(a, tokens) for a in pool]
                pool = [a for _, a in sorted(zip(losses, pool, strict=True))[:survivors]]
            losses = yield [Query(a, most) for a in (*pool, parent)]  # the parent only meets the finalists
            beaten.update(pool)
            best, child = min(zip(losses[:-1], pool, strict=True))
            parent, idle = (child, 0) if best < losses[-1] else (parent, idle + 1)
        return parent

    def _stages(self, tokens: int) -> list[tuple[int, int | None]]:
        """(survivors, tokens) within the tokens there are; stages that would judge on the same tokens are one."""
        if tokens == 0:
            return [(1, None)]
        capped = [(survivors, min(asked, tokens)) for survivors, asked in self.selections]
        return [stage for stage, after in zip(capped, [*capped[1:], (0, 0)], strict=True) if stage[1] != after[1]]

    def _children(
        self, space: Space, parent: Allocation, beaten: set[Allocation], rng: random.Random
    ) -> list[Allocation]:
        """Up to `filter * offspring` distinct children no final has seen; by enumeration where luck finds too few."""
        children: dict[Allocation, None] = {}  # an ordered set
        count = self.filter * self.offspring
        for _ in range(4 * count):
            steps = min(rng.randint(1, self.exchanges), rng.randint(1, self.exchanges))  # (1)
            child = parent
            for _ in range(steps):
                child = _exchanged(space, child, rng) or child
            if child not in beaten:
                children[child] = None
            if len(children) == count:
                return list(children)
        others = (a for a in _around(space, parent, self.exchanges, rng) if a not in beaten and a not in children)
        return [*children, *islice(others, count - len(children))]


def _around(space: Space, centre: Allocation, most: int, rng: random.Random) -> Iterator[Allocation]:
    """Everything within `most` exchanges of a centre, nearest first, in random order at the same distance."""
    seen, ring = {centre}, [centre]
    for _ in range(most):
        ring, inner = [], ring
        for here in inner:
            there = [a for a in space.swaps(here) if a not in seen]
            rng.shuffle(there)
            seen.update(there)
            ring += there
            yield from there


def _exchanged(space: Space, here: Allocation, rng: random.Random) -> Allocation | None:
    """A random exchange between two sites that share a partition; None where that one is not possible."""
    partitions = [members for members, _ in space.partitions if len(members) > 1]
    if not partitions:
        return None
    (members,) = rng.choices(partitions, weights=[len(members) for members in partitions])
    up, down = rng.sample(members, 2)
    return space.swap(here, up, down)
