"""Prune the bundled model to half of its blocks with the default recipe, and show what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunekit.demo import MODEL
from prunekit.errors import WrongInput
from prunekit.export.verify import verify
from prunekit.measure.evaluate import load
from prunekit.measure.speed import size, speed
from prunekit.recipe.schema import Recipe
from prunekit.run.prune import prune
from prunekit.run.results import Result
from prunekit.system.progress import Progress

# amounts that end in two minutes on two cores
SETTINGS = {
    "model": str(MODEL),
    "sparsity": 0.5,
    "data.dataset": "python-docs",
    "data.seqlen": 256,
    "data.calibration_tokens": 16_384,
    "data.search_tokens": 16_384,
    "data.evaluation_tokens": 16_384,
    "allocator.inner.generations": 4,
}


@dataclass(frozen=True)
class Demo:
    """Dense against pruned, by the rows of the table, and how far the loaded model is from the one in memory."""

    dense: dict[str, float]
    pruned: dict[str, float]
    difference: float


def run(output: Path, progress: Progress | None = None) -> Demo:
    """Prune, measure, load back.

    Raises:
        WrongInput: `output` holds something that is not a pruned model.
        NotVerified: what was loaded back is another model.
    """
    if not (MODEL / "config.json").is_file():
        raise WrongInput(f"the bundled model is not at {MODEL}; install prunekit from its wheel, or train it again")
    progress = progress or Progress()
    ours = (output / "recipe.yaml").is_file()  # an earlier demo may be replaced, nothing else
    result = prune(Recipe.load().with_overrides(SETTINGS), output=output, progress=progress, overwrite=ours)
    assert result.probe is not None
    difference = verify(output, *result.probe, result.report["pruned"]["parameters"]).difference
    with progress.stage("speed", 2) as stage:
        dense = _numbers(result, "dense", MODEL)
        stage.advance(note="dense")
        pruned = _numbers(result, "pruned", output)
        stage.advance(note="pruned")
    return Demo(dense, pruned, difference)


def _numbers(result: Result, which: str, folder: Path) -> dict[str, float]:
    model = load(str(folder), device="cpu", dtype="float32")
    pace, counts = speed(model), result.report[which]
    return {
        "parameters": counts["parameters"],
        "block parameters": counts["block_parameters"],
        "perplexity": result.report["losses"][which]["perplexity"],
        "size on disk": size(model, folder).bytes,
        "prefill tokens/s": pace.prefill,
        "decode tokens/s": pace.decode,
    }
