"""Dense against pruned, in tokens per second: both loaded, timed in interleaved rounds, for batches of several sizes.

    python benchmarks/speed.py DENSE PRUNED --batches 1,8,64

Medians, ± half of the range of the middle half of the rounds; ratios round by round, with an interval that misses the
true one in 5 %. With one thread (the default) the clock is that thread's own, and other programs count little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from prunekit.measure.evaluate import load
from prunekit.measure.speed import PROMPT, READ, ROUNDS, compared, size, speeds, workload
from prunekit.space.prices import Workload
from prunekit.system.progress import progress_for


def main(
    dense: str,
    pruned: str,
    batches: Annotated[str, typer.Option(help="sequences at once, by comma; auto: as `prunekit demo` does")] = "auto",
    new_tokens: int = 16,
    rounds: int = ROUNDS,
    threads: Annotated[int, typer.Option(help="on a CPU")] = 1,
    device: str = "cpu",
    dtype: str = "auto",
) -> None:
    """Print a Markdown table."""
    torch.set_num_threads(threads)
    models = {name: load(name, device=device, dtype=dtype) for name in (dense, pruned)}
    before, after = (size(model, Path(name)) for name, model in models.items())
    print(
        f"{after.parameters / before.parameters:.3f} of the parameters, {after.bytes / before.bytes:.3f} of the bytes\n"
    )
    print("| | dense | pruned | ratio | timed |\n|---|---|---|---|---|")
    for batch in batches.split(","):
        asked = None if batch == "auto" else Workload(int(batch), max(1, min(PROMPT, READ // int(batch))), new_tokens)
        work = asked or workload(models[dense])
        found = speeds(models, progress_for(), work=work, rounds=rounds)
        for row in compared(found[dense], found[pruned]):
            print(f"| {' | '.join(row)} | {found[dense]} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
