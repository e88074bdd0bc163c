"""`prunekit.prune` and `prunekit.tune`, for people who have a model at hand and a few wishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel

from prunekit.choices import Choices
from prunekit.pipeline import Result
from prunekit.pipeline import prune as run
from prunekit.progress import Progress, progress_for
from prunekit.recipe import Recipe

if TYPE_CHECKING:
    from prunekit.tuning import Tuned


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
    chosen, in_memory = _chosen(model, recipe, settings)
    return run(
        chosen,
        model=in_memory,
        tokenizer=tokenizer,
        output=None if output is None else Path(output),
        progress=progress or progress_for(quiet),
        resume=resume,
        overwrite=overwrite,
    )


def tune(
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: Any = None,
    *,
    space: str | Path | Mapping[str, Any] = "default",
    trials: int = 50,
    output: str | Path,
    metric: str | Sequence[str] = "perplexity",
    sampler: Literal["tpe", "nsga-ii", "nsga-iii"] = "tpe",
    recipe: str | Path | Recipe = "default",
    storage: str | None = None,
    study_name: str | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> Tuned:
    """Search for a better recipe than `recipe` within a space: a file, a preset, or recipe keys with their choices.

    The same call goes on with a study that was interrupted, or with more `trials`. Several metrics make a front.
    `settings` are recipe keys, as in `prune`. Needs the extra prunekit[optuna].

    Raises:
        WrongInput: says what was asked, what there is and what to do.

    Example:
        >>> space = {"pruner": ["wanda", {"name": "obs", "aim": ["own", "stream"]}]}
        >>> tuned = prunekit.tune("my-model", space=space, output="study", recipe="fast")  # doctest: +SKIP
        >>> small = prunekit.prune(recipe=tuned.best)  # doctest: +SKIP
    """
    from prunekit import tuning  # it needs an extra

    chosen, in_memory = _chosen(model, recipe, settings)
    return tuning.tune(
        chosen,
        Choices.of_mapping(space) if isinstance(space, Mapping) else Choices.load(space),
        trials=trials,
        output=Path(output),
        metrics=(metric,) if isinstance(metric, str) else tuple(metric),
        sampler=sampler,
        storage=storage,
        study_name=study_name,
        model=in_memory,
        tokenizer=tokenizer,
        progress=progress or progress_for(quiet),
        resume=resume,
        overwrite=overwrite,
    )


def _chosen(
    model: str | Path | PreTrainedModel | None, recipe: str | Path | Recipe, settings: dict[str, Any]
) -> tuple[Recipe, PreTrainedModel | None]:
    """The recipe with the settings and the model's name in it, and the model where it is in memory."""
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if isinstance(data := settings.pop("data", None), dict):
        settings |= {f"data__{key}": value for key, value in data.items()}
    chosen = chosen.with_overrides({key.replace("__", "."): value for key, value in settings.items()})
    in_memory = model if isinstance(model, PreTrainedModel) else None
    if model is not None and in_memory is None:
        chosen = chosen.with_overrides({"model": str(model)})
    return chosen, in_memory
