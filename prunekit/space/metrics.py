"""Metrics: what a budget counts, in whole units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from prunekit.errors import WrongInput
from prunekit.space.forms import Units
from prunekit.space.sites import Site


class Metric(ABC):
    """What a budget counts: the price of every count of groups, of weights per row, or of ranks, at every site.

    Prices are integers and add up over sites, so that a budget can be met exactly.
    """

    unit: ClassVar[str]  # in sentences: sparsity 0.5 of parameters, 12 parameters
    structures: ClassVar[frozenset[str]] = frozenset({"groups", "weights", "n:m", "low-rank", "values"})
    """Whose removal it counts."""
    counts_width: ClassVar[bool] = True
    """Whether prices of the sites of a narrower model, and what is outside them, say what its width has freed."""

    @abstractmethod
    def price(self, site: Site, kept: int) -> int:
        """What `kept` groups of `site` cost, or weights per row; it does not fall when more is kept."""

    @abstractmethod
    def outside(self, sites: Sequence[Site], parameters: int) -> int:
        """What costs something and can be removed at no site.

        Args:
            sites: all of the model.
            parameters: how many belong to no site, of the blocks or of the model, as the budget is of either.

        Returns:
            Their price, or what else the whole takes beside its sites.

        Raises:
            WrongInput: the prices are those of other sites.
        """

    def counts(self, site: Site) -> Sequence[int]:
        """The counts worth keeping, ascending, the last one all there is; here every one."""
        return range(site.least, site.n_groups + 1, site.step)

    def for_checkpoint(self, bytes_per_parameter: int) -> Metric:
        """This metric for a model that is saved with so many bytes per parameter; here the same for all."""
        return self

    def check(self, units: Units) -> None:
        """Refuse, before any work, a structure whose removal is not worth anything in this metric.

        Raises:
            WrongInput: says why.
        """
        if units not in self.structures:
            known = " or ".join(sorted(self.structures))
            raise WrongInput(f"structure {units} frees nothing in {self.unit}, which goes with structure {known}")

    def unreachable(self, share: Fraction, least: int, full: int) -> str:
        """The sentence for a share that cannot be met, where `least` of `full` units always stay."""
        return (
            f"sparsity {float(1 - share):.4g} of {self.unit} cannot be met: "
            f"reachable is 0 to {1 - least / full:.4g}, because {least:,} of {full:,} always stay"
        )


@dataclass(frozen=True)
class Parameters(Metric):
    """Parameters, coupled rows and biases included."""

    unit: ClassVar[str] = "parameters"

    def price(self, site: Site, kept: int) -> int:
        return site.parameters(kept)

    def outside(self, sites: Sequence[Site], parameters: int) -> int:
        return parameters


PARAMETERS = Parameters()
