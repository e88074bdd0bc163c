"""Prune the bundled model to half of its blocks with the default recipe, and show what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunekit.demo import MODEL
from prunekit.errors import WrongInput
from prunekit.export.verify import verify
from prunekit.measure.evaluate import load
from prunekit.measure.rounds import one_thread
from prunekit.measure.speed import compared, size, speeds
from prunekit.recipe.schema import Recipe
from prunekit.run.prune import prune
from prunekit.run.session import Job
from prunekit.system.progress import Progress

# amounts that end in a minute on two cores
SETTINGS = {
    "model": str(MODEL),
    "sparsity": 0.5,
    "data.dataset": "python-docs",
    "data.seqlen": 256,
    "data.calibration_tokens": 16_384,
    "data.search_tokens": 16_384,
    "data.evaluation_tokens": 16_384,
}


@dataclass(frozen=True)
class Demo:
    """Dense against pruned, by the rows of the table, and how far the loaded model is from the one in memory."""

    dense: dict[str, float]
    pruned: dict[str, float]
    speed: list[tuple[str, str, str, str]]  # further rows: what, dense, pruned, ratio
    timed: str  # what these rows are of
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
    job = Job(output=output, progress=progress, overwrite=ours)
    result = prune(Recipe.load().with_overrides(SETTINGS), job)
    assert result.probe is not None
    difference = verify(output, *result.probe, result.report["pruned"]["parameters"]).difference
    folders = {"dense": MODEL, "pruned": output}
    models = {which: load(str(folder), device="cpu", dtype="float32") for which, folder in folders.items()}
    with one_thread():  # where the clock can leave out what other programs take
        pace = speeds(models, progress)
    counts = {
        which: {
            "parameters": result.report[which]["parameters"],
            "block parameters": result.report[which]["block_parameters"],
            "perplexity": result.report["losses"][which]["perplexity"],
            "size on disk": size(models[which], folder).bytes,
        }
        for which, folder in folders.items()
    }
    rows = compared(pace["dense"], pace["pruned"])
    return Demo(counts["dense"], counts["pruned"], rows, f"{pace['dense']}; ratios with 95 % intervals", difference)
