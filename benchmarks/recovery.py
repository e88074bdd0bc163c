"""What `distillation` gains on the tokens that a model was pruned with, and on those that follow them in the text.

    python benchmarks/recovery.py DENSE PRUNED --dataset calibration.txt --evaluation test.txt --seqlen 512

PRUNED is a result of which single weights were not removed, from the first `--tokens` of the data set. Perplexities
are of float32, before the weights are rounded to the dtype of the checkpoint.
"""

from __future__ import annotations

import time

import typer

from prunekit import TokenBatch, Workpiece
from prunekit.data.draws import draw
from prunekit.data.spec import DataSpec
from prunekit.measure.evaluate import load
from prunekit.measure.perplexity import perplexity
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import opened
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import progress_for
from prunekit_strategies.finishers.distillation import Distillation


def main(
    dense: str,
    pruned: str,
    dataset: str = "python-docs",
    evaluation: str | None = None,
    seqlen: int = 256,
    tokens: int = 16_384,
    evaluation_tokens: int = 8_192,
    rate: float = Distillation.rate,
    epochs: int = 2,
    dtype: str = "auto",
) -> None:
    """Print a Markdown table."""
    teacher = opened(dense, device="cpu", dtype=dtype)
    names = {"dataset": dataset, "evaluation_dataset": evaluation}
    counts = {"calibration_tokens": 2 * tokens, "search_tokens": seqlen, "evaluation_tokens": evaluation_tokens}
    draws = draw(teacher.tokenizer, DataSpec.model_validate({**names, **counts, "seqlen": seqlen}))
    seen, unseen = draws.calibration.ids.split(len(draws.calibration) // 2)[:2]
    print(f"rate {rate:g}, {epochs} epochs of {seen.numel():,} tokens\n")
    print("| trained on | undone | held-out divergence | perplexity | before | seconds |\n|---|---|---|---|---|---|")
    for name, ids in (("those it was pruned with", seen), ("those that follow", unseen)):
        small = load(pruned, device="cpu", dtype="float32")
        before, start = perplexity(small, draws.evaluation).value, time.perf_counter()
        piece = Workpiece(
            small, teacher.model, adapter_for(small.config.model_type), (), (), (), TokenBatch(ids, name), 0,
            progress_for(), Checkpoints(),
        )  # fmt: skip
        said = Distillation(rate=rate, epochs=epochs).finish(piece)
        seconds, (first, last) = time.perf_counter() - start, said["held_out_loss"]
        after = perplexity(small, draws.evaluation).value
        print(
            f"| {name} | {said['undone']} of {said['epochs']} | {first:.4f} to {last:.4f} "
            f"| {after:.2f} | {before:.2f} | {seconds:.0f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
