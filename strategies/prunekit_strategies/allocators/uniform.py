"""The same share of every site: the yardstick in every table."""

from dataclasses import dataclass

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, WrongInput


@dataclass(frozen=True)
class Uniform(Allocator):
    """Keep the same share of every site, as near as whole groups and the exact budget allow."""

    equal: bool = False  # one count for all sites of a kind and size, so that stock classes hold the model; spends less

    def first_space(self, whole: Space) -> Space:
        """One rung per site: there is nothing to choose, so nothing else need be pruned."""
        return whole.zoomed(self._counts(whole), stride=0.0, reach=0)

    def search(self, problem: Problem) -> Search:
        yield [Query(problem.start)]  # the answer is known; the question puts its loss into the ledger
        return problem.start

    def last_space(self, whole: Space, best: Allocation) -> Space:
        return whole.zoomed(best, stride=0.0, reach=0) if self.equal else super().last_space(whole, best)

    def _counts(self, whole: Space) -> Allocation:
        counts = whole.uniform()
        if not self.equal:
            return counts
        spared = {(site.kind, site.spared) for site in whole.sites}
        if any((kind, not whole) in spared for kind, whole in spared):
            raise WrongInput(
                "equal: true wants one count for all sites of a kind, and `spare` keeps some of them whole; "
                "leave one of the two away"
            )
        least: dict[object, int] = {}  # by kind and size: what the poorest of its sites keeps
        for site, kept in zip(whole.sites, counts, strict=True):
            least[site.kind, site.n_groups] = min(kept, least.get((site.kind, site.n_groups), kept))
        return tuple(least[site.kind, site.n_groups] for site in whole.sites)
