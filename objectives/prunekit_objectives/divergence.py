"""Judge an allocation by how far its next-token distribution is from the dense model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import prunekit as pk


@dataclass(frozen=True)
class Divergence(pk.Objective):
    """Mean Kullback-Leibler divergence of the dense model's p from the pruned model's q, in nats.

    Over the dense model's top_k tokens S, with the rest as one event (rest = True, default):

        Σ_{v∈S} p_v log(p_v / q_v) + (1 - p_S) log((1 - p_S) / (1 - q_S))          (1)

    or with both sides renormalised on S (rest = False, as Týr-the-Pruner, arXiv 2503.09657). (1) is never
    above the divergence over the whole vocabulary and never below p_S times the renormalised one; it sees
    probability that leaks out of S. Every position of every window counts.
    """

    top_k: int = 512
    rest: bool = True

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k is a number of tokens, at least 1, not {self.top_k}")

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        total = 0.0
        for dense, (_, logits) in zip(net.dense_top(batch, self.top_k), net.logits(allocation, batch), strict=True):
            log_p = dense.log_probs
            log_q = logits.gather(-1, dense.ids.long()) - logits.logsumexp(-1, keepdim=True)
            if self.rest:
                log_p, log_q = _with_rest(log_p), _with_rest(log_q)
            else:
                log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))  # (1)
        return max(total / batch.n_tokens, 0.0)

    def reads(self, depth: int) -> pk.Reads:
        return pk.Reads(top=self.top_k)


def _with_rest(log_p: torch.Tensor) -> torch.Tensor:
    """Append log(1 - Σ exp): the probability of every other token, never below float32 resolution."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True, dtype=torch.float64)).clamp_min(1e-9).log()
    return torch.cat([log_p, rest.to(log_p.dtype)], -1)
