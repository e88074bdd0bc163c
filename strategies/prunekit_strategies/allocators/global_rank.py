"""Global ranking: all units of all sites in one order, cut where the budget is met."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from prunekit import Allocation, Allocator, Problem, Query, Search, Space, check_choices
from prunekit_strategies.allocators.competing import best_of

FINE = 1 / 128  # stride of the second calibration pass, share of a site's groups
Normalise = Literal["z-score", "l2", "none"]


@dataclass(frozen=True)
class GlobalRank(Allocator):
    """Let the units of all sites compete by the pruner's scores, and remove the least until the budget is met.

        z-score  t_u = (s_u - mean s)/std s     l2  t_u = s_u / ‖s‖₂     none  t_u = s_u          (1)
        remove units by ascending t_u, or t_u / price of u, until Σ price of what stays ≤ limit    (2)

    with s the scores of the units of one site. (2) with scores that add up, one price and no normalisation is the
    exact optimum; with several prices, by t/p, it is so wherever the cut spends the budget. At most a share `most` of a
    site goes: z-scores do not protect a site, every site has low ones. The limit gives way where the budget leaves no
    other choice. What is removed for one budget is removed for every smaller one.

    Sources: FLAP (An et al. 2024, arXiv 2312.11983), z-scores in the order of the score, prices in the cut alone: its
    z are of channels, which the pruner's `standardise: channels` gives, and `normalise: none` leaves as they are;
    LLM-Pruner (Ma et al. 2023, arXiv 2305.11627), its global mode. Ours: exact integer prices (a head is worth its
    price in neurons), the protected share, and `compete`: the start is among the answers the objective chooses from.
    Which units of a site go stays with the pruner, in the same order. Normalised scores differ little between sites, so
    that coarse rungs would round them to the start: a second calibration pass around the first answer has rungs
    of FINE.
    """

    normalise: Normalise = "z-score"
    per_price: bool = False  # rank by score per price
    most: float = 0.9  # largest share of a site's groups that may be removed
    compete: bool = True  # let the start win where the objective prefers it

    def __post_init__(self) -> None:
        check_choices(self)
        if self.per_price and self.normalise == "z-score":
            raise ValueError("a z-score is below 0 for half of the units, so it has no price; normalise by l2 or none")
        if not 0 < self.most <= 1:
            raise ValueError(f"0 < most ≤ 1, not {self.most}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores"})

    def next_space(self, space: Space, best: Allocation) -> Space | None:
        return space.zoomed(best, stride=FINE, reach=8) if space.stride > FINE else None

    def search(self, problem: Problem) -> Search:
        answer = problem.space.nearest(self.wish(problem))
        answers = dict.fromkeys([problem.start, answer] if self.compete else [answer])
        losses = yield [Query(a) for a in answers]
        return best_of(type(self).__name__, problem, list(answers), losses)

    def wish(self, problem: Problem) -> list[int]:
        """Kept groups per site, before rounding to the ladders."""
        assert problem.scores is not None
        space = problem.space
        kept = [site.n_groups for site in space.sites]
        for members, limit in space.partitions:
            units: list[tuple[float, float, int]] = []  # (t, place in its site, site): ties go evenly
            for i in members:
                site = space.sites[i]
                price = space.budget.price(site, site.n_groups) / site.n_groups
                if price == 0:
                    continue  # nothing is saved here
                bearing = sorted(normal(problem.scores[i], self.normalise))
                removable = min(math.floor(Fraction(str(self.most)) * site.n_groups), site.n_groups - site.least)
                units += [
                    (t / price if self.per_price else t, (place + 1) / site.n_groups, i)
                    for place, t in enumerate(bearing[:removable])
                ]
            spare = limit - sum(space.budget.price(space.sites[i], kept[i]) for i in members)
            for _, _, i in sorted(units):  # (2)
                if spare >= 0:
                    break
                site = space.sites[i]
                spare += space.budget.price(site, kept[i]) - space.budget.price(site, kept[i] - 1)
                kept[i] -= 1
        return kept


def normal(scores: Sequence[float], how: Normalise) -> list[float]:
    """(1): zeros where there is nothing to tell apart."""
    scale = max(map(abs, scores)) or 1.0  # squares of huge scores are infinite
    parts = [s / scale for s in scores]
    if how == "l2":
        norm = math.sqrt(math.fsum(p * p for p in parts)) or 1.0
        return [p / norm for p in parts]
    if how == "z-score":
        mean = math.fsum(parts) / len(parts)
        deviation = math.sqrt(math.fsum((p - mean) ** 2 for p in parts) / len(parts))
        return [(p - mean) / deviation if deviation > 1e-12 else 0.0 for p in parts]
    return list(scores)
