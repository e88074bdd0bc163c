"""What pruners share that score once and keep the best; no method of its own."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, best_weights
from prunekit.layer.candidates import Per, ranked
from prunekit.layer.problem import Nested, Truncated


class Ranking(LocalPruner):
    """Keep the groups, or the single weights, of largest score. On a tie the lower id stays.

    A subclass has `scores` where it knows groups, and `cells` where it knows single weights.
    """

    per: Per  # among which single weights compete
    refit: bool  # least-squares weights on what is kept; False: as they are

    @property
    def matrices(self) -> int:
        return 1 if self.refit else 0

    @property
    def keeps_scales(self) -> bool:
        return not self.refit

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        if layer.structure != "groups":
            masks = best_weights(self.cells(layer), keeps, self.per, layer.m)
            return [layer.refitted_rows(mask) if self.refit else layer.sparse(mask) for mask in masks]
        if (nested := self.nested(layer)) is not None:
            return nested.candidates(keeps)
        ranking = self.ranking(layer)
        return [layer.masked(ranking[:keep]) for keep in keeps]

    def keep(self, layer: LayerProblem, groups: Sequence[int], scales: Tensor | None = None) -> Candidate:
        return layer.refitted(groups) if self.refit else layer.masked(groups, scales)

    def nested(self, layer: LayerProblem) -> Nested | Truncated | None:
        return layer.nested(self.ranking(layer)) if self.refit else None

    def ranking(self, layer: LayerProblem) -> list[int]:
        """Group ids, the best first."""
        score = self.scores(layer)
        assert score is not None
        return ranked(score)

    def cells(self, layer: LayerProblem) -> Float[Tensor, "d_out d_in"]:
        """A score for every weight, in float64."""
        raise NotImplementedError(f"{type(self).__name__} scores no single weights")
