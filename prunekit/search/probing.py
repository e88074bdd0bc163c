"""Where a limit ends a search: how much of it the probes took, and what that makes of the answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from prunekit.space.sites import Allocation

LARGE = 0.5  # share of the limit: searches whose probes take more come to much the same answer


@dataclass(frozen=True)
class Spent:
    """What a search had asked when its limit ended it."""

    limit: int  # token-forwards
    probes: int  # token-forwards of probes, which teach and cannot win
    others: int  # allocations judged beside them
    asked: int  # token-forwards of the questions that the limit did not let pass

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Spent:
        """As a ledger has it."""
        return cls(**{name: int(record[name]) for name in ("limit", "probes", "others", "asked")})

    @property
    def by_probes(self) -> bool:
        """Whether there was no room for a search, or little, beside its probes."""
        return self.probes > LARGE * self.limit or not self.others

    @property
    def words(self) -> str:
        """What that means for the answer; empty where a search had room."""
        if not self.by_probes:
            return ""
        if not self.probes and not self.others:
            return (
                f"the first questions take {self.asked:,} token-forwards and search_budget is {self.limit:,}: nothing "
                "is asked, and the answer is where the search starts"
            )
        beside = f"after {self.others:,} allocations more" if self.others else "before anything else is judged"
        return (
            f"probes take {self.probes:,} of the {self.limit:,} token-forwards of search_budget, which end the search "
            f"{beside}: the answer is the best of a table of probes or near it, as that of other searches that begin "
            "with one"
        )


@dataclass
class Tally:
    """What a search has asked so far."""

    probes: int = 0  # token-forwards
    others: set[Allocation] = field(default_factory=set)  # judged beside them

    def count(
        self,
        probes: Collection[tuple[Allocation, int]],
        new: Collection[tuple[Allocation, int]],
        prices: Mapping[tuple[Allocation, int], int],
    ) -> None:
        """Count questions, each an allocation and its tokens.

        Args:
            probes: those that only teach.
            new: those that this search had not asked.
            prices: token-forwards of those that were paid for.
        """
        self.probes += sum(paid for key, paid in prices.items() if key in probes)
        self.others |= {key[0] for key in new if key not in probes}

    def ended(self, limit: int, asked: int) -> Spent:
        """As a limit leaves it, before questions that take so many token-forwards."""
        return Spent(limit, self.probes, len(self.others), asked)
