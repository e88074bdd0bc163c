"""An objective for prunekit: how good a candidate model is; lower is better."""

from __future__ import annotations

from dataclasses import dataclass

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Objective):
    """How often the pruned model's next token is none that the dense model finds likely.

        1 - (share of the tokens at which argmax p_pruned is among the `top` likeliest of p_dense)      (1)

    Source: write here the paper, and where the code differs from it.
    """

    top: int = 1  # how many tokens of the dense model count as right

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        """The loss of an allocation: your formula goes here."""
        right = 0
        pairs = zip(net.dense_top(batch, self.top), net.logits(allocation, batch), strict=True)
        for dense, (_, logits) in pairs:  # a few windows at a time
            chosen = logits.argmax(-1, keepdim=True)  # (windows, length, 1)
            right += int((chosen == dense.ids).any(-1).sum())
        return 1 - right / batch.n_tokens  # (1)

    def reads(self, depth: int) -> pk.Reads:
        """What `loss` reads; no more may be read."""
        return pk.Reads(top=self.top)
