"""Judge an allocation by the error table alone: no forward pass, exact optimum by dynamic programming."""

from __future__ import annotations

from dataclasses import dataclass

import prunekit as pk


@dataclass(frozen=True)
class ExpectedError(pk.Objective):
    """J(a) = Σ_i ω_i e_i(a_i), the summed relative output error of the chosen rungs; ω_i = 1.

    Free, additive, and the same for every allocator: the yardstick of comparisons. Not a loss of the
    model: errors of early sites pass through everything behind them, which the table does not see.
    """

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        return sum(net.site_errors(allocation))

    def reads(self, depth: int) -> pk.Reads:
        return pk.Reads(tokens=False)
