"""Local pruners: what to keep of one layer, at every count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from prunekit.layer.candidates import Candidate
from prunekit.layer.problem import LayerProblem, Nested, Truncated
from prunekit.layer.statistics import Need
from prunekit.plugins.learner import Effort

Within = Literal["map", "block"]


class LocalPruner(ABC):
    """Answers, for one layer, what to keep at every count."""

    structures: ClassVar[frozenset[str]] = frozenset({"groups"})  # and/or weights, n:m, low-rank
    within: Within = "map"
    """What a layer receives behind the pruned blocks: what the pruned maps of its own block produce, or, with `block`,
    what that block does while it is dense. An attribute, or a field of a pruner that has both."""

    @property
    def needs(self) -> frozenset[Need]:
        """What calibration must tell of a layer: names in `prunekit.calibration.statistics.STATISTICS`, or statistics.

        gram, cross, drift, producers: the fields of a `LayerProblem`. All else the layer is to `require` by its name.
        power: of every producer. contrast: a second data set is read. gradient: gradient and fisher of the layer, and
        of producers if asked. sub-layer: the layer's `sublayer`, to be run with other weights.
        """
        return frozenset({"gram"})

    @property
    def matrices(self) -> int:
        """How many float64 matrices (d_in, d_in) it makes at once, for plans: damped, its factor, its inverse."""
        return 3 if "gram" in self.needs else 0

    @property
    def keeps_scales(self) -> bool:
        """Whether `keep` multiplies by a learner's scales, as here; one that refits says no."""
        return True

    def effort(self, chunks: Sequence[int], seqlen: int) -> Effort:
        """What one candidate sends through the `sublayer`, for plans: no more, and no less; nothing, as here.

        Args:
            chunks: windows of every chunk.
            seqlen: tokens of a window.
        """
        return Effort(0)

    @abstractmethod
    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        """One candidate for every count in `keeps`, in that order.

        `keeps` holds distinct counts of kept groups in any order, 0 and all included. The layer is not changed.

        Where `layer.structure` is weights, a count k allows k non-zeros in every row, or k · d_out anywhere; where it
        is n:m, k · m / d_in in every m of a row, m = `layer.m`. Such candidates have no `kept`. Where it is low-rank,
        counts are ranks from 1, and candidates have `factors`; `layer.most` is the count of the weight as it is.
        """

    def keep(
        self, layer: LayerProblem, groups: Sequence[int], scales: Float[Tensor, " kept"] | None = None
    ) -> Candidate:
        """These groups, which a learner has chosen, with the weights that this pruner gives what it keeps.

        Here as they are, those of every group multiplied by its scale where the learner has scales. A pruner that
        refits does it here too: its weights are the best for the groups, and scales play no part in them.
        """
        return layer.masked(groups, scales)

    def nested(self, layer: LayerProblem) -> Nested | Truncated | None:
        """The refits of all counts along one ranking, or the truncations to all ranks along one basis, of which `prune`
        gives those that are asked for.

        With them every count has its price though few are made. None, as here: the candidates are no such answers.
        """
        return None

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"] | None:
        """What each group is worth, larger is better, for allocators that rank the groups of all sites together.

        None, as here: this pruner weighs no group by itself.
        """
        return None
