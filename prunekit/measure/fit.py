"""Whether a model knows a text: its bits per byte on a few windows, beside what models of its size are known to reach.

Losses per token compare with nothing but losses of the same tokenizer; bits per byte of text compare between models.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from prunekit.data.tokens import TokenBatch
from prunekit.measure.perplexity import perplexity

LOOKED_AT = 1_024  # tokens that the model reads of all sources together, at least one window of each
SHORTEST = 64  # tokens of a window; in shorter ones most tokens have too little in front of them
LEAST = 512  # tokens of a source; a loss on fewer is chance
BYTES = 4.48  # of a token of that law: MassiveText's 10.5 TB, of which 12.8 % are 300 billion tokens (arXiv:2112.11446)
FACTOR = 2.0  # models were found to need 0.9 to 1.7 times as many bits of text that they know (docs/results.md)


def expected_bits(parameters: int) -> float:
    """Compute the bits per byte of English text that a model of some size can reach.

    The law of Hoffmann et al. (arXiv:2203.15556, eq. 10) without end of data, L = 1.69 + 406.4 / N^0.34 nats per token,
    in bytes of text by our division.

    Args:
        parameters: N, of the whole model.
    """
    return (1.69 + 406.4 / parameters**0.34) / (BYTES * math.log(2))


def bits_per_byte(model: nn.Module, tokenizer: Any, batch: TokenBatch) -> float:
    """Measure the bits that a model needs for a byte of text; inf where its loss is not finite.

    Args:
        model: a causal language model, whole or paged.
        tokenizer: that has made the tokens.
        batch: the text, (windows, length) token ids.
    """
    targets = batch.ids[:, 1:]  # the first token of a window, which may be BOS, is not predicted
    size = sum(len(tokenizer.decode(ids).encode()) for ids in targets.tolist())
    return perplexity(model, batch).nll * targets.numel() / (math.log(2) * max(1, size))


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
    if batch.seqlen < SHORTEST:
        return []
    expected, said = expected_bits(parameters), list[str]()
    for name, part in batch.parts.items():
        if part.n_tokens < LEAST:
            continue
        bits = bits_per_byte(model, tokenizer, part.spread(LOOKED_AT // len(batch.parts)))
        if bits > FACTOR * expected:
            said.append(
                f"warning: the dense model does not know the text of {name}: it needs {bits:.2f} bits per byte, and "
                f"models of {parameters / 1e6:,.1f} million parameters about {expected:.2f}; see that its language, "
                "tokenizer, data.window_start and chat template are those that the model was trained on, or give other "
                "text"
            )
    return said
