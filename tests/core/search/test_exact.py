"""The optimum that is said to be exact is that of trying everything, and nothing is said where it is not known."""

import math
import random
from dataclasses import dataclass, replace
from itertools import product

import pytest

from prunekit.data.tokens import TokenBatch
from prunekit.plugins.objective import Answers, Objective, Reads
from prunekit.search.exact import TINY, find_optimum
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.testing import toy_supernet, toy_tokens


@dataclass(frozen=True)
class Weighed(Objective):
    """Σ_i w_i e_i(a_i), or the largest of them, which is no sum."""

    largest: bool = False

    def loss(self, net: Answers, allocation: Allocation, batch: TokenBatch) -> float:
        errors = [(1 + i) * e for i, e in enumerate(net.site_errors(allocation))]
        return max(errors) if self.largest else math.fsum(errors) - 0.5

    def reads(self, depth: int) -> Reads:
        return Reads(tokens=False)


@dataclass(frozen=True)
class Far(Objective):
    """How far logits are from zero: reads tokens."""

    def loss(self, net: Answers, allocation: Allocation, batch: TokenBatch) -> float:
        return float(sum(logits.square().sum() for _, logits in net.logits(allocation, batch)))


def with_rungs(counts: int) -> Supernet:
    """The toy network with so many rungs of every site, the lowest and the highest among them."""
    net = toy_supernet()
    ladders = tuple(
        tuple(sorted({ladder[round(j * (len(ladder) - 1) / (counts - 1))] for j in range(counts)}))
        for ladder in net.space.ladders
    )
    space = replace(net.space, ladders=ladders)
    return Supernet(net.model, net.adapter, space, net.table(space), net.store)


def lowest(net: Supernet, objective: Objective) -> float:
    """By trying all."""
    able = (a for a in product(*net.space.ladders) if net.space.is_feasible(a))
    return min(net.loss(objective, a, toy_tokens()) for a in able)


@pytest.mark.parametrize("seed", range(4))
def test_of_a_sum_over_sites_it_is_what_trying_everything_finds(seed: int) -> None:
    net, rng = with_rungs(4), random.Random(seed)
    answer = net.space.nearest([rng.uniform(0, site.n_groups) for site in net.space.sites])
    found = find_optimum(net, Weighed(), answer, toy_tokens(), seed)
    assert found is not None
    assert found.how == "table"
    assert found.lowest == pytest.approx(lowest(net, Weighed()), rel=1e-12)
    assert found.reached == net.loss(Weighed(), answer, toy_tokens()) >= found.lowest


def test_what_is_no_sum_is_not_taken_for_one() -> None:
    net = with_rungs(4)
    assert math.prod(map(len, net.space.ladders)) > TINY
    answer = net.space.uniform()
    assert find_optimum(net, Weighed(largest=True), answer, toy_tokens(), 0) is None
    assert find_optimum(net, Far(), answer, toy_tokens(), 0) is None


@pytest.mark.parametrize("objective", [Weighed(largest=True), Far()])
def test_in_a_tiny_space_every_allocation_is_judged(objective: Objective) -> None:
    net = with_rungs(2)
    assert math.prod(map(len, net.space.ladders)) <= TINY
    answer = net.space.nearest([0.0, *(site.n_groups for site in net.space.sites[1:])])
    found = find_optimum(net, objective, answer, toy_tokens(), 0)
    assert found is not None
    assert found.how == "all"
    assert found.lowest == pytest.approx(lowest(net, objective), rel=1e-6)
    assert found.reached >= found.lowest


def test_where_there_is_nothing_to_choose_nothing_is_said() -> None:
    net = toy_supernet()
    space = net.space.zoomed(net.space.uniform(), stride=0.0, reach=0)
    alone = Supernet(net.model, net.adapter, space, net.table(space), net.store)
    assert find_optimum(alone, Weighed(), space.uniform(), toy_tokens(), 0) is None
