"""Once for all: a family of models against its largest member alone and against a run for every member, in one process.

    python benchmarks/family.py MODEL --dataset calibration.txt --evaluation test.txt --sparsity 0.2,0.3,0.4,0.5

Ratios of seconds are of this run. Perplexities are on one text, their difference is paired by window.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from prunekit.data.draws import draw
from prunekit.measure.perplexity import perplexity
from prunekit.models.opening import limits
from prunekit.recipe.overrides import parsed
from prunekit.recipe.schema import Recipe
from prunekit.run.family import family
from prunekit.run.prune import prune
from prunekit.run.results import Result
from prunekit.run.session import Job
from prunekit.system.progress import progress_for


def main(
    model: str,
    dataset: str = "python-docs",
    evaluation: str | None = None,
    sparsity: Annotated[str, typer.Option(help="of the members, by comma")] = "0.2,0.3,0.4,0.5",
    recipe: str = "default",
    seqlen: int = 256,
    tokens: Annotated[int, typer.Option(help="of calibration, of search and of evaluation, each")] = 16_384,
    setting: Annotated[list[str] | None, typer.Option("--set", help="key.path=value")] = None,
) -> None:
    """Print two Markdown tables."""
    shared = {"model": model, "verify": False, "data.dataset": dataset, "data.seqlen": seqlen}
    shared |= {"data.evaluation_dataset": evaluation}
    shared |= {f"data.{part}_tokens": tokens for part in ("calibration", "search", "evaluation")}
    shared |= dict(map(parsed, setting or []))
    base, job = Recipe.load(recipe).with_overrides(shared), Job(progress=progress_for())
    together = base.spread({"sparsity": [float(share) for share in sparsity.split(",")]})
    assert together is not None
    begun = time.perf_counter()
    made = family(together, job)
    took, alone, seconds = time.perf_counter() - begun, list[Result](), list[float]()
    for share in together.family or (together.sparsity,):
        begun = time.perf_counter()
        alone.append(prune(base.with_overrides({"sparsity": share}), job))
        seconds.append(time.perf_counter() - begun)

    paid = [result.report["search"]["token_forwards"] for result in alone]
    rows = {
        f"family of {len(alone)}": (took, made.document["token_forwards"]),
        f"one, {alone[-1].recipe.sparsity}": (seconds[-1], paid[-1]),
        f"{len(alone)} runs": (sum(seconds), sum(paid)),
    }
    print("\n| | seconds | of one | token-forwards | of one |\n|---|---|---|---|---|")
    for name, (spent, forwards) in rows.items():
        ratio = f"{forwards / paid[-1]:.2f}" if paid[-1] else ""
        print(f"| {name} | {spent:.1f} | {spent / seconds[-1]:.2f} | {forwards:,} | {ratio} |")

    print("\n| sparsity | parameters | perplexity in the family | alone | rise of nll, paired |\n|---|---|---|---|---|")
    text = draw(alone[0].tokenizer, base.data, job.progress, seed=base.seed, **limits(alone[0].model)).evaluation
    for one, other in zip(made.members, alone, strict=True):
        ours, theirs = perplexity(one.model, text), perplexity(other.model, text)
        rise, error = ours.above(theirs)
        same = f"{one.report['pruned']['parameters']:,} / {other.report['pruned']['parameters']:,}"
        print(f"| {one.recipe.sparsity} | {same} | {ours.value:.2f} | {theirs.value:.2f} | {rise:+.4f} ± {error:.4f} |")
    print(f"\n{made.document['label']}; dense {made.document['dense']['perplexity']:.2f}")


if __name__ == "__main__":
    typer.run(main)
