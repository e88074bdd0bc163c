"""What a calibration pass costs beside what it cannot do without: forward passes, and one Gram product per site.

    python benchmarks/calibration_pass.py MODEL --dataset calibration.txt --tokens 65536

Forward pass, products and passes take turns in one process; the best of `--rounds` counts. A pass fills all rungs of a
ladder, judged and stored; `default` is the first pass of that recipe, which makes one candidate per site and prices all
counts, and `fisher` what that recipe does before it. Seconds by stage are of that pass, and the rest is what no stage
claims. A pass that has the dense model beside it cannot do with less than two forward passes and the products. With one
thread the clock is the process's own, and other programs count little.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from prunekit.calibration import fill
from prunekit.calibration.flow import BlockFlow, Stream
from prunekit.calibration.gradients import FISHER_TOKENS, OutputFisher
from prunekit.calibration.moments import Moments, precise
from prunekit.data.draws import draw
from prunekit.data.tokens import TokenBatch
from prunekit.layer.problem import LayerProblem
from prunekit.models.blocks import chunks, entered
from prunekit.models.opening import opened
from prunekit.plugins.dense import Dense
from prunekit.plugins.registry import PRUNERS
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.spaces import whole_space
from prunekit.search.store import CandidateStore
from prunekit.system.progress import Progress

STAGES: dict[str, list[tuple[Any, str]]] = {
    "forward": [(BlockFlow, "__init__"), (Stream, "caught"), (BlockFlow, "carry"), (BlockFlow, "advance")],
    "moments": [(Moments, "add"), (Moments, "of_map")],
    "pruner": [(fill, "priced_at_once"), (fill, "answers")],
    "errors": [(LayerProblem, "error")],
    "store": [(CandidateStore, "put"), (fill, "expected_weight")],
}
PASSES = ("wanda", "obs", "obs dense", "obs stream", "default", "fisher")


def main(
    model: str,
    dataset: str = "python-docs",
    seqlen: int = 256,
    tokens: int = 65_536,
    rungs: Annotated[int, typer.Option(help="of a ladder, from dense to empty")] = 9,
    passes: Annotated[
        str, typer.Option(help="by comma: a pruner, a second word is its aim; default; fisher")
    ] = ",".join(PASSES),
    rounds: int = 3,
    threads: Annotated[int | None, typer.Option(help="on a CPU; else as many as it has cores")] = None,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Print a Markdown table."""
    if threads is not None:
        torch.set_num_threads(threads)
    data = {"data.dataset": dataset.split(","), "data.seqlen": seqlen, "data.calibration_tokens": tokens}
    recipe = Recipe.load().with_overrides({"sparsity": 0.3, "data.search_tokens": seqlen, **data})
    dense = opened(model, device=device, dtype=dtype)
    batch = draw(dense.tokenizer, recipe.data).calibration
    jobs: dict[str, Callable[[], dict[str, float]]] = {
        "forward": lambda: forward(dense, batch),
        "products": lambda: products(dense, recipe, batch),
    }
    jobs |= {name: (lambda name=name: calibrate(dense, recipe, batch, name, rungs)) for name in passes.split(",")}
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, job in jobs.items():
            spent = job()
            if name not in best or spent["all"] < best[name]["all"]:
                best[name] = spent
    computed = str(dense.model.dtype).removeprefix("torch.")
    machine = f"{dense.model.device}, {computed}, {torch.get_num_threads()} threads"
    rate, pair = best["products"]["rate"] / 1e9, (best["forward"]["all"], best["products"]["all"])
    print(f"{batch.n_tokens:,} tokens, {rungs} rungs; {machine}, products at {rate:,.0f} GFLOP/s")
    print("one forward pass {:.1f} s, one Gram product per site {:.1f} s\n".format(*pair))
    heads = ["pass with", "seconds", "of one forward + products", "of two + products", *STAGES, "rest"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in passes.split(","):
        spent = best[name]
        ratios = (f"{spent['all'] / (count * pair[0] + pair[1]):.2f}" for count in (1, 2))
        rest = spent["all"] - sum(spent[stage] for stage in STAGES)
        parts = (f"{seconds:.1f}" for seconds in (*(spent[stage] for stage in STAGES), rest))
        print(f"| {' | '.join([name, format(spent['all'], '.1f'), *ratios, *parts])} |")


def forward(dense: Dense, batch: TokenBatch) -> dict[str, float]:
    """All tokens through all blocks, as the model has them."""
    blocks, begun = dense.adapter.blocks(dense.model), now()
    with torch.no_grad():
        for ids in chunks(batch):
            hidden, calls = entered(dense.model, dense.adapter, ids)
            for call, block in zip(calls, blocks, strict=True):
                hidden = call(block, hidden)
    return {"all": now() - begun}


def products(dense: Dense, recipe: Recipe, batch: TokenBatch) -> dict[str, float]:
    """x̂ᵀx̂ in float32 for every site, in the pieces of a calibration pass."""
    widths = [site.d_in for site in whole_space(resolve(recipe), dense.model, dense.adapter, dense.dtype).sites]
    pieces = [ids.numel() for ids in chunks(batch)]
    seen = {width: precise(torch.randn(pieces[0], width, device=dense.model.device)) for width in set(widths)}
    begun = now()
    for width in widths:
        total = torch.zeros(width, width, device=dense.model.device)
        for piece in pieces:
            total += seen[width][:piece].T @ seen[width][:piece]
    spent = now() - begun
    return {"all": spent, "rate": sum(2 * width**2 for width in widths) * batch.n_tokens / spent}


def calibrate(dense: Dense, recipe: Recipe, batch: TokenBatch, name: str, rungs: int) -> dict[str, float]:
    """Seconds of a calibration pass, in all and by stage."""
    plugin, _, aim = name.partition(" ")
    parts, priced = resolve(recipe), name in ("default", "fisher")
    whole = whole_space(parts, dense.model, dense.adapter, dense.dtype)
    pruner = parts.pruner if priced else PRUNERS.build({"name": plugin, "aim": aim} if aim else plugin)
    space = whole.zoomed(whole.uniform(), stride=1 / (rungs - 1), reach=rungs)
    if priced:
        space = parts.allocator.first_space(whole)
    spent = dict.fromkeys(STAGES, 0.0)
    originals = [(owner, method, getattr(owner, method)) for part in STAGES.values() for owner, method in part]
    try:
        for stage, part in STAGES.items():
            for owner, method in part:
                setattr(owner, method, timed(getattr(owner, method), spent, stage))
        with tempfile.TemporaryDirectory() as folder:
            store, fisher, begun = CandidateStore(Path(folder) / "candidates", {}), None, now()
            if priced:
                fisher = OutputFisher.collected(
                    dense.model, dense.adapter, space.sites, batch.spread(FISHER_TOKENS), recipe.seed,
                    Path(folder) / "fisher", Progress(),
                )  # fmt: skip
            if name == "fisher":
                return spent | {"all": now() - begun}
            begun = now()
            fill.build(
                dense.model, dense.adapter, space, space.nearest(whole.uniform()), pruner, batch, store,
                carry=recipe.carry if priced else "expected", damping=recipe.damping, dtype=dense.dtype,
                fisher=fisher, sparse=priced, progress=Progress(),
            )  # fmt: skip
            return spent | {"all": now() - begun}
    finally:
        for owner, method, original in originals:
            setattr(owner, method, original)


def timed(function: Callable[..., Any], spent: dict[str, float], stage: str) -> Callable[..., Any]:
    """The same function, on the clock. Stages do not call one another."""

    def on_the_clock(*args: Any, **kwargs: Any) -> Any:
        begun = now()
        try:
            return function(*args, **kwargs)
        finally:
            spent[stage] += now() - begun

    return on_the_clock


def now() -> float:
    """Seconds, when the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
