"""Whether a model knows a text: its bits per byte on a few windows, beside what models of its size are known to reach.

Losses per token compare with nothing but losses of the same tokenizer; bits per byte of text compare between models.
"""

from __future__ import annotations

import math
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from prunekit.data.tokens import TokenBatch
from prunekit.measure.perplexity import perplexity

LOOKED_AT = 1_024  # tokens that the model reads of all sources together, at least one window of each
SHORTEST = 64  # tokens of a window; in shorter ones most tokens have too little in front of them
LEAST = 512  # tokens of a source; a loss on fewer is chance
BYTES = 4.48  # of a token of that law: MassiveText's 10.5 TB, of which 12.8 % are 300 billion tokens (arXiv:2112.11446)
FACTOR = 2.0  # models were found to need 1.1 to 1.8 times as many bits of text that they know (docs/results.md)


def expected_bits(parameters: int) -> float:
    """Compute the bits per byte of English text that a model of some size can reach.

    The law of Hoffmann et al. (arXiv:2203.15556, eq. 10) without end of data, L = 1.69 + 406.4 / N^0.34 nats per token,
    in bytes of text by our division.

    Args:
        parameters: N, of the whole model.
    """
    return (1.69 + 406.4 / parameters**0.34) / (BYTES * math.log(2))


def bits_per_byte(tokenizer: Any, ids: Int64[Tensor, "windows seqlen"], nats: float) -> float:
    """Convert a loss into bits per byte of the text that was predicted.

    Args:
        tokenizer: that has made the tokens.
        ids: windows of text; their first tokens, which may be BOS, are not predicted.
        nats: per token, the mean of the others.
    """
    targets = ids[:, 1:]
    size = sum(len(tokenizer.decode(window).encode()) for window in targets.tolist())
    return nats * targets.numel() / (math.log(2) * max(1, size))


def doubts(model: nn.Module, tokenizer: Any, batch: TokenBatch, parameters: int) -> list[str]:
    """Say of every source of a text that the model does not know it, where it needs far more bits than its size says.

    Args:
        model: a causal language model, whole or paged.
        tokenizer: that has made the tokens.
        batch: the text, (windows, length) token ids; a few of its windows are read.
        parameters: of the whole model.

    Returns:
        A sentence for every source that does not fit; none where there is too little to say so.
    """
    few = {
        name: part.spread(LOOKED_AT // len(batch.parts)).ids
        for name, part in batch.parts.items()
        if part.n_tokens >= LEAST and part.seqlen >= SHORTEST
    }
    if not few:
        return []
    losses = iter(perplexity(model, TokenBatch(torch.cat(list(few.values())), batch.source)).losses)
    expected, said = expected_bits(parameters), list[str]()
    for name, ids in few.items():
        bits = bits_per_byte(tokenizer, ids, fmean(islice(losses, len(ids))))
        if not bits <= FACTOR * expected:  # also where it is no number
            said.append(
                f"warning: the dense model does not know the text of {name}: it needs {bits:.2f} bits per byte, and "
                f"models of {parameters / 1e6:,.1f} million parameters about {expected:.2f}; see that its language, "
                "tokenizer, data.window_start and chat template are those that the model was trained on, or give other "
                "text"
            )
    return said
