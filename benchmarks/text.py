"""How well a model, dense or pruned, knows some texts: with BOS in front of every window and without, and shuffled.

    python benchmarks/text.py MODEL one.txt two.txt --seqlen 512 --tokens 8192

Bits per byte are beside those that models of this size are expected to need.
"""

from __future__ import annotations

import torch
import typer

from prunekit import TokenBatch
from prunekit.data.draws import draw_evaluation
from prunekit.data.encoding import Encoder
from prunekit.data.spec import DataSpec
from prunekit.errors import WrongInput
from prunekit.measure.evaluate import load
from prunekit.measure.fit import bits_per_byte, expected_bits
from prunekit.measure.perplexity import perplexity
from prunekit.models.opening import limits, load_tokenizer
from prunekit.report.document import count


def main(model: str, texts: list[str], seqlen: int = 512, tokens: int = 8_192, shuffled: bool = False) -> None:
    """Print a Markdown table."""
    loaded, tokenizer = load(model, device="cpu"), load_tokenizer(model)
    expected = expected_bits(count(loaded))
    try:
        start = Encoder(tokenizer).start("bos")
    except WrongInput:  # it has none
        start = []
    print("| text | perplexity | with BOS | bits per byte | times the expected |\n|---|---|---|---|---|")
    for text in texts:
        asked = DataSpec(dataset=text, seqlen=seqlen, evaluation_tokens=tokens)
        batch = draw_evaluation(tokenizer, asked, **limits(loaded))
        if shuffled:
            order = torch.randperm(batch.n_tokens, generator=torch.Generator().manual_seed(0))
            batch = TokenBatch(batch.ids.flatten()[order].reshape(batch.ids.shape), f"{batch.source}, shuffled")
        alone = perplexity(loaded, batch)
        bits = bits_per_byte(tokenizer, batch.ids, alone.nll)
        begun = f"{perplexity(loaded, batch.begun_with(start)).value:.2f}" if start else "–"
        print(f"| {batch.source} | {alone.value:.2f} | {begun} | {bits:.2f} | {bits / expected:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
