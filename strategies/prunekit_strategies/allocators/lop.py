"""LOP: search a few budgets by a tree, learn from them, and answer any other budget without a search."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from prunekit import Allocation, Allocator, Problem, Query, Search, Searched, Space, WrongInput
from prunekit_strategies.allocators.probes import judged_again

MIN_BUDGETS = 3  # to learn from: fewer draw no curve


@dataclass(frozen=True)
class LOP(Allocator):
    """Without a `model` a tree search; with one, the answer of a network that has learnt from searches.

    The search: nodes are shares r of what every site keeps, the root is the start. Each of `simulations` goes from the
    root down by

        argmax_child  (high - mean) / (high - low) + explore √(ln N / n)                          (1)

    with n visits of the child, N of its parent, the mean of the losses at and below the child, and the losses so far
    between low and high; gives the leaf it comes to `children` children r + U(±max(step · 0.9^depth, 0.01)); and asks
    about one of them, drawn. The best of all that were asked about are judged again on all tokens, beside the start.

    The network: pairs (c, r) of a budget, as a share of the price of all groups, and an allocation for it. A causal
    transformer has r_i from c and r_1 … r_{i-1}, by least squares:

        min Σ (r̂_i(c, r_<i) - r_i)²                                                               (2)

    The pairs are the optima, under `grid` budgets, of one additive table that is fitted to all judgements of all
    searches (see `fitted`); with `grid: 0`, as published, the `pairs` best allocations of every search.

    `prunekit learn-budgets MODEL` makes it, with this search or an `inner` one. A budget then costs no question.

    Source: LOP (arXiv:2506.12826): 300 simulations, explore 1.414, 4 children, step 0.1; a transformer of 2 layers,
    width 128, 4 heads, 200 epochs. The released network is an encoder of 4 layers that has all shares at once. Its
    search masks the model and rewards accuracy on benchmark questions, its constraint bounds the plain mean of shares
    from above, and its answer is the node of best mean, also of one that was visited once. Ours: every node spends
    the budget exactly, the objective rewards, (1) measures differences of means in the range of losses, since losses
    are not between 0 and 1, the answer is what was judged best itself, and the fitted table makes the pairs: what one
    search finds is the best of a few near ties, which of them changes from budget to budget, and a network can learn
    no rule of that.
    """

    model: str | None = None  # folder of `prunekit learn-budgets`; None: search
    inner: Allocator | None = None  # searches in the place of the tree
    simulations: int = 300
    explore: float = 1.414
    children: int = 4  # of a leaf
    step: float = 0.1  # largest change of a share, at the root
    least: float = 0.1  # smallest share a node may want of a site
    tokens: int = 2_048  # to judge a node on
    finalists: int = 4  # judged again on all tokens
    grid: int = 64  # budgets whose optimum of the fitted table is learnt; 0: what searches judged best is
    pairs: int = 1  # best of every search, with `grid: 0`: more are nearer to the mean of all, which is uniform
    epochs: int = 1_000  # steps of training
    batch: int = 16  # pairs of a step
    rate: float = 1e-3
    width: int = 128
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        counts = (self.simulations, self.children, self.tokens, self.finalists, self.pairs, self.epochs, self.layers)
        if min(*counts, self.heads, self.batch) < 1 or self.width < self.heads or self.width % self.heads:
            raise ValueError("counts are at least 1, and width is a multiple of heads")
        if self.grid < 0 or 0 < self.grid < MIN_BUDGETS:
            raise ValueError(f"grid is 0 or at least {MIN_BUDGETS} budgets, not {self.grid}")
        if not (self.explore >= 0 and self.step > 0 and 0 <= self.least < 1 and self.rate > 0):
            raise ValueError("explore ≥ 0, step > 0, 0 ≤ least < 1 and rate > 0 are needed")

    @property
    def signals(self) -> tuple[Any, ...]:
        return () if self.inner is None or self.model is not None else self.inner.signals

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.inner is None or self.model is not None else self.inner.needs

    @property
    def asks(self) -> bool:
        if self.model is not None:
            return False
        return True if self.inner is None else self.inner.asks

    def ready(self) -> None:
        if self.model is not None:
            _ = self._learnt
        elif self.inner is not None:
            self.inner.ready()

    def first_space(self, whole: Space) -> Space:
        if self.model is None:
            return super().first_space(whole) if self.inner is None else self.inner.first_space(whole)
        return whole.zoomed(self.predicted(whole), stride=0.0, reach=0)

    def next_space(self, space: Space, best: Allocation) -> Space | None:
        return None if self.inner is None or self.model is not None else self.inner.next_space(space, best)

    def last_space(self, whole: Space, best: Allocation) -> Space:
        if self.inner is None or self.model is not None:
            return super().last_space(whole, best)
        return self.inner.last_space(whole, best)

    def predicted(self, space: Space) -> Allocation:
        """What the network answers for the budget of a space.

        Raises:
            WrongInput: it has learnt from another model, or under another metric.
        """
        from prunekit_strategies.budget_network import facts_of, share_of

        network, facts = self._learnt
        for key, here in facts_of(space).items():
            if facts.get(key) != here:
                raise WrongInput(
                    f"{self.model} has learnt from a model with other {key} than this one; "
                    "make one with `prunekit learn-budgets` of this model, with the same structure and metric"
                )
        shares = network.answer(share_of(space))
        return space.nearest([share * site.n_groups for share, site in zip(shares, space.sites, strict=True)])

    def search(self, problem: Problem) -> Search:
        if self.model is not None:
            return problem.start
        return (yield from (self._tree(problem) if self.inner is None else self.inner.search(problem)))

    def _tree(self, problem: Problem) -> Search:
        space, rng, seen = problem.space, random.Random(problem.seed), Range()
        shares = [kept / site.n_groups for kept, site in zip(problem.start, space.sites, strict=True)]
        root, losses = Node(shares, problem.start), dict[Allocation, float]()
        tokens = min(self.tokens, problem.tokens) or None
        node = root
        for _ in range(self.simulations):
            if node.allocation not in losses:
                (losses[node.allocation],) = yield [Query(node.allocation, tokens)]
            node.record(seen.bounded(losses[node.allocation]))
            node = leaf(root, seen, self.explore)  # (1)
            node.grow(space, rng, self.children, self.step, self.least)
            node = rng.choice(node.children)
        best = sorted(losses, key=lambda allocation: (losses[allocation], allocation))
        return (yield from judged_again(best[: self.finalists], problem))

    def learn(self, searches: Sequence[Searched], folder: Path) -> None:
        from prunekit_strategies.budget_network import facts_of, save, share_of, taught
        from prunekit_strategies.fitted_table import fitted, optima

        if len(searches) < MIN_BUDGETS:
            raise WrongInput(f"{len(searches)} budgets are too few to learn from; give {MIN_BUDGETS} or more")
        table = fitted(searches) if self.grid else None
        if table is None:  # as published
            pairs = [(each.whole, allocation) for each in searches for allocation, _ in each.judged[: self.pairs]]
        else:
            pairs = optima(searches, table, self.grid)
        budgets = [share_of(whole) for whole, _ in pairs]
        shares = [[kept / site.n_groups for kept, site in zip(a, whole.sites, strict=True)] for whole, a in pairs]
        sizes = {"width": self.width, "layers": self.layers, "heads": self.heads}
        network = taught(budgets, shares, steps=self.epochs, batch=self.batch, rate=self.rate, seed=0, **sizes)
        searched = [share_of(each.whole) for each in searches]
        save(network, facts_of(searches[0].whole) | {"budgets": sorted(searched), "pairs": len(pairs)}, folder)

    @cached_property
    def _learnt(self) -> tuple[Any, dict[str, Any]]:
        from prunekit_strategies.budget_network import load

        assert self.model is not None
        return load(self.model)


@dataclass(eq=False)
class Node:
    """An allocation, and what was found at it and below."""

    shares: Sequence[float]  # kept, by site, as they were drawn
    allocation: Allocation  # the nearest that spends the budget
    depth: int = 0
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0  # of the losses at and below it

    @classmethod
    def at(cls, space: Space, shares: Sequence[float], parent: Node | None = None) -> Self:
        """The node of some shares."""
        wanted = [share * site.n_groups for share, site in zip(shares, space.sites, strict=True)]
        return cls(shares, space.nearest(wanted), 0 if parent is None else parent.depth + 1, parent)

    def grow(self, space: Space, rng: random.Random, children: int, step: float, least: float) -> None:
        """Add children: every share moved by at most max(step · 0.9^depth, 0.01), within least … 1."""
        reach = max(step * 0.9**self.depth, 0.01)
        for _ in range(children):
            moved = [min(max(share + rng.uniform(-reach, reach), least), 1.0) for share in self.shares]
            self.children.append(Node.at(space, moved, self))

    def record(self, loss: float) -> None:
        """Count a loss here and in all above."""
        node: Node | None = self
        while node is not None:
            node.visits += 1
            node.total += loss
            node = node.parent


@dataclass
class Range:
    """The losses so far: what a difference of means is measured in."""

    low: float = math.inf
    high: float = -math.inf

    def bounded(self, loss: float) -> float:
        """A loss to be counted: what failed is as bad as the worst that has not."""
        if not math.isfinite(loss):
            return self.high if math.isfinite(self.high) else 0.0
        self.low, self.high = min(self.low, loss), max(self.high, loss)
        return loss


def bound(node: Node, seen: Range, explore: float) -> float:
    """UCT: (high - mean) / (high - low) + explore · √(ln N / n), N the visits of the parent; unvisited nodes first."""
    if not node.visits or node.parent is None:
        return math.inf
    spread = seen.high - seen.low
    mean = node.total / node.visits
    gain = (seen.high - mean) / spread if 0 < spread < math.inf else 0.0
    return gain + explore * math.sqrt(math.log(max(node.parent.visits, 1)) / node.visits)


def leaf(root: Node, seen: Range, explore: float) -> Node:
    """From the root down to a node without children, at every step the child of largest bound, the first on a tie."""
    node = root
    while node.children:
        node = max(node.children, key=lambda child: bound(child, seen, explore))
    return node
