"""Experts that few tokens select go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from prunekit import LayerProblem, Need, Received, Statistic
from prunekit.layer.statistics import Sums
from prunekit_strategies.pruners.ranking import Ranking


@dataclass(frozen=True)
class Selected(Statistic):
    """The share of tokens that select an expert: to which it adds something other than zeros."""

    name: ClassVar[str] = "selected"

    def add(self, sums: Sums, received: Received) -> None:
        adds = received.by_token(received.inputs != 0).any(1)  # (tokens, experts)
        sums["sum"] += received.channels * adds.sum(0)


@dataclass(frozen=True)
class ExpertFrequency(Ranking):
    """Keep the experts that are selected most often.

        s_e = |T_e| / T        T tokens, of which T_e select expert e                                         (1)

    The baseline of REAP (Lasby et al. 2025, arXiv 2510.13999), `frequency` in its released code.

    Ours: on a tie what adds more power stays, then the lower id. Of a site without experts the score of a group is the
    sum of the shares in which its inputs are not zero.
    """

    refit: bool = False  # one factor for every expert that stays, by least squares at the routing of the dense model

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Selected(), "gram"})

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        """s_e in float64."""
        return layer.group_sum(layer.require(Selected()))  # (1)

    def ranking(self, layer: LayerProblem) -> list[int]:
        shares, power = self.scores(layer).tolist(), layer.group_sum(layer.gram.diagonal()).tolist()
        return sorted(range(layer.n_groups), key=lambda group: (-shares[group], -power[group], group))
