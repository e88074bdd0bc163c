"""What judging a model costs a CPU by the tokens of a forward pass.

    python benchmarks/judging.py MODEL --seqlen 256 --tokens 16384

Processor seconds of this process alone, every size in turn and the lowest of the rounds, so that other programs count
little. On random tokens: the loss means nothing.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM

from prunekit.data.tokens import TokenBatch
from prunekit.measure.perplexity import LOGITS_AT_ONCE, perplexity, tokens_at_once


def main(model: Path, seqlen: int = 256, tokens: int = 16_384, rounds: int = 3) -> None:
    """Print a Markdown table; the size that `prunekit evaluate` takes here is marked."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    vocabulary = network.config.vocab_size
    ids = torch.randint(0, vocabulary, (tokens // seqlen, seqlen), generator=torch.Generator().manual_seed(0))
    text = TokenBatch(ids, "random")
    chosen = max(1, tokens_at_once(vocabulary, torch.device("cpu")) // seqlen)
    most = max(1, LOGITS_AT_ONCE // (seqlen * vocabulary))
    sizes = sorted({1, chosen, 4 * chosen, most})
    took = dict.fromkeys(sizes, float("inf"))
    for _ in range(rounds):
        for windows in sizes:
            began = time.process_time()
            perplexity(network, text, batch_size=windows)
            took[windows] = min(took[windows], time.process_time() - began)
    print("| windows at once | processor ms a token | of the chosen |")
    print("|---|---|---|")
    for windows, seconds in took.items():
        name = f"**{windows}**" if windows == chosen else str(windows)
        print(f"| {name} | {1000 * seconds / ids.numel():.3f} | {seconds / took[chosen]:.2f} |")


if __name__ == "__main__":
    typer.run(main)
