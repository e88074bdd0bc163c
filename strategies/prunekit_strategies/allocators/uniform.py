"""The same share of every site: the yardstick in every table."""

from dataclasses import dataclass

from prunekit import Allocator, Problem, Query, Search, Space


@dataclass(frozen=True)
class Uniform(Allocator):
    """Keep the same share of every site, as near as whole groups and the exact budget allow."""

    def first_space(self, whole: Space) -> Space:
        """One rung per site: there is nothing to choose, so nothing else need be pruned."""
        return whole.zoomed(whole.uniform(), stride=0.0, reach=0)

    def search(self, problem: Problem) -> Search:
        yield [Query(problem.start)]  # the answer is known; the question puts its loss into the ledger
        return problem.start
