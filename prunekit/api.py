"""`prunekit.prune`: the pipeline for people who have a model at hand and a few wishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prunekit.pipeline import Result
from prunekit.pipeline import prune as run
from prunekit.progress import Progress, progress_for
from prunekit.recipe import Recipe


def prune(
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: Any = None,
    *,
    recipe: str | Path | Recipe = "default",
    output: str | Path | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> Result:
    """Prune a model: a folder, a hub id, or one in memory with its tokenizer (which stays as it is).

    `settings` are recipe keys: sparsity=0.5, pruner="obs", allocator={"name": "tyr", ...}, data={...}; a key
    of a nested part is written with two underscores, data__seqlen=256.

    Raises:
        WrongInput: says what was asked, what there is and what to do.

    Example:
        >>> small = prunekit.prune("my-model", sparsity=0.5)  # doctest: +SKIP
        >>> small.save("my-model-half")  # doctest: +SKIP
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if isinstance(data := settings.pop("data", None), dict):
        settings |= {f"data__{key}": value for key, value in data.items()}
    chosen = chosen.with_overrides({key.replace("__", "."): value for key, value in settings.items()})
    in_memory = model if isinstance(model, PreTrainedModel) else None
    if model is not None and in_memory is None:
        chosen = chosen.with_overrides({"model": str(model)})
    return run(
        chosen,
        model=in_memory,
        tokenizer=tokenizer,
        output=None if output is None else Path(output),
        progress=progress or progress_for(quiet),
        resume=resume,
        overwrite=overwrite,
    )
