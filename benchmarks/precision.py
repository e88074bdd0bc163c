"""What the dtype of the computation changes, beside what the choice of calibration tokens changes anyway.

    python benchmarks/precision.py MODEL --dataset calibration.txt --evaluation other.txt

Every row is pruned uniformly. "kept otherwise": of the groups that the first row keeps, those that this row does not.
Half floats have their moments from the activations that a half-precision forward pass makes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from prunekit.calibration.fill import build
from prunekit.data.draws import draw
from prunekit.measure.perplexity import perplexity
from prunekit.models.opening import opened
from prunekit.plugins.registry import PRUNERS
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.spaces import whole_space
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.system.progress import Progress


def main(
    model: str,
    dataset: str = "python-docs",
    evaluation: str | None = None,
    seqlen: int = 256,
    tokens: int = 65_536,
    sparsity: float = 0.5,
    dtypes: Annotated[str, typer.Option(help="by comma, the first is the measure")] = "float64,float32,bfloat16",
    pruner: str = "obs",
    device: str = "auto",
) -> None:
    """Print a Markdown table."""
    first, *others = dtypes.split(",")
    print("| computed in | calibration tokens | kept otherwise | perplexity | of the dense |\n|---|---|---|---|---|")
    measure: list[frozenset[int]] = []
    for dtype, count in [(first, tokens), (first, tokens // 2), *((dtype, tokens) for dtype in others)]:
        data = {"dataset": dataset.split(","), "evaluation_dataset": evaluation, "seqlen": seqlen}
        data |= {"calibration_tokens": count, "search_tokens": seqlen, "evaluation_tokens": tokens}
        recipe = Recipe.load().with_overrides({"sparsity": sparsity} | {f"data.{k}": v for k, v in data.items()})
        kept, pruned, dense = uniform(recipe, model, dtype, pruner, device)
        measure = measure or kept
        other = sum(len(a - b) for a, b in zip(measure, kept, strict=True)) / sum(map(len, measure))
        print(f"| {dtype} | {count:,} | {other:.2%} | {pruned:.2f} | {dense:.2f} |", flush=True)


def uniform(
    recipe: Recipe, model: str, dtype: str, pruner: str, device: str
) -> tuple[list[frozenset[int]], float, float]:
    """Groups kept by site, perplexity of what is left, and of the dense model."""
    dense = opened(model, device=device, dtype=dtype)
    draws = draw(dense.tokenizer, recipe.data)
    whole = whole_space(resolve(recipe), dense.model, dense.adapter, dense.dtype)
    plan = whole.nearest(whole.uniform())
    space = whole.zoomed(plan, reach=0)
    with tempfile.TemporaryDirectory() as folder:
        store = CandidateStore(Path(folder), {})
        errors = build(
            dense.model, dense.adapter, space, plan, PRUNERS.build(pruner), draws.calibration, store,
            dtype=dense.dtype, progress=Progress(),
        )  # fmt: skip
        net = Supernet(dense.model, dense.adapter, space, errors, store)
        kept = [frozenset(store.get(site, count).kept or ()) for site, count in zip(space.sites, plan, strict=True)]
        before, after = (perplexity(each, draws.evaluation) for each in (dense.model, net.assemble(plan)))
    return kept, after.value, before.value


if __name__ == "__main__":
    typer.run(main)
