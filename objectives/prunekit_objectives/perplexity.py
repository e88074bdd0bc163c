"""Judge an allocation by how well it predicts the next token of the search text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import prunekit as pk


@dataclass(frozen=True)
class Perplexity(pk.Objective):
    """exp(mean -log q(next token)) over positions 1 … L-1 of every window.

    The metric of reports. As a search target it fits the text it is given: prefer `divergence`.
    """

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        total, count = 0.0, 0
        for ids, logits in net.logits(allocation, batch):
            if ids.shape[1] < 2:
                continue
            nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total += float(nll)
            count += ids[:, 1:].numel()
        mean = total / count if count else math.nan
        return math.exp(mean) if mean < 700 else math.inf
