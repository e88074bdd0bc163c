"""Judge an allocation by a table alone: no forward pass, exact optimum by dynamic programming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import prunekit as pk


@dataclass(frozen=True)
class ExpectedError(pk.Objective):
    """J(a) = Σ_i t_i(a_i): what the chosen rungs lose, site by site, summed.

        errors    t_i the relative output error                                         (1)
        fisher    t_i = ½ tr[F_i (W* - Ŵ)(H_i + λI)(W* - Ŵ)ᵀ], nats per token           (2)

    Free, additive, and the same for every allocator: the yardstick of comparisons. (2) weighs an error by what it is
    worth: F_i is the Fisher matrix of the sub-layer's output, on labels sampled from the dense model. Neither is a loss
    of the model: errors of early sites pass through everything behind them, which a table does not see. On language
    models with massive activations (1) misleads, for a few tokens and channels carry nearly all of its power.

    Source: (2) is K-FAC (Martens & Grosse 2015, arXiv 1503.05671) on layer outputs, as LLM Surgeon has it for weights
    (van der Ouderaa et al. 2023, arXiv 2312.17244); as a table over counts derived here.
    """

    table: Literal["errors", "fisher"] = "errors"

    def __post_init__(self) -> None:
        pk.check_choices(self)

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        return sum(net.site_errors(allocation) if self.table == "errors" else net.site_nats(allocation))

    def reads(self, depth: int) -> pk.Reads:
        return pk.Reads(tokens=False, nats=self.table == "fisher")
