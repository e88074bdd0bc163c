"""Judge an allocation by the mean and the spread of the model's last states, against the dense model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

import prunekit as pk


@dataclass(frozen=True)
class LatentStats(pk.Objective):
    """Change of the mean and of the standard deviation of the residual stream behind the last block.

    With h(t) of the pruned model and h°(t) of the dense one, both (d,), over all tokens t of the batch, channel by
    channel:

        J(a) = ‖mean_t h - mean_t h°‖₂ + ‖sd_t h - sd_t h°‖₂                        (1)

    There is no label and no vocabulary in it, and of the dense model two vectors are all that is compared.

    It is blind to whatever keeps both moments of every channel: with the states of the dense model at other tokens,
    in any order, J is 0. So it can tell what a removed sub-layer does to the states as a whole, and is no judge of
    what each token gets.

    Source: LD-Pruner (Castells et al., arXiv:2404.11936), which scores the operators of a diffusion model by what the
    removal of each does to the latents it generates: a change of their mean and one of their spread, added up. The
    norm over channels, and the last states of a language model in the place of latents, are derived.
    """

    def loss(self, net: pk.Answers, allocation: pk.Allocation, batch: pk.TokenBatch) -> float:
        sums: Float64[Tensor, "4 d"] | None = None  # of h - shift and its square, and the same of h°
        shift: Float64[Tensor, " d"] | None = None  # near the means: squares of what is far from 0 lose their digits
        depths = (net.depth,)
        for (mine,), (dense,) in zip(
            net.hidden(allocation, batch, depths), net.dense_hidden(batch, depths), strict=True
        ):
            h, h0 = (states.flatten(0, -2).double() for states in (mine, dense))
            shift = h0.mean(0) if shift is None else shift
            h, h0 = h - shift, h0 - shift
            part = torch.stack([h.sum(0), h.square().sum(0), h0.sum(0), h0.square().sum(0)])
            sums = part if sums is None else sums + part
        assert sums is not None  # a batch has a window
        mean, square, mean0, square0 = sums / batch.n_tokens
        spread, spread0 = ((q - m.square()).clamp_min(0).sqrt() for q, m in ((square, mean), (square0, mean0)))
        return float((mean - mean0).norm() + (spread - spread0).norm())  # (1)

    def reads(self, depth: int) -> pk.Reads:
        return pk.Reads(depths=(depth,))
