"""`prunekit.prune` and `prunekit.tune`, for people who have a model at hand and a few wishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from transformers import PreTrainedModel

from prunekit.plugins.registry import plain
from prunekit.recipe.choices import Choices
from prunekit.recipe.schema import Recipe
from prunekit.run.family import Family
from prunekit.run.family import family as run_all
from prunekit.run.prune import prune as run
from prunekit.run.results import Result
from prunekit.system.progress import Progress, progress_for

if TYPE_CHECKING:
    from prunekit.run.tune import Tuned


@overload
def prune(
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: Any = None,
    *,
    sparsity: list[float] | tuple[float, ...],
    **settings: Any,
) -> Family: ...
@overload
def prune(
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: Any = None,
    *,
    sparsity: float = ...,
    **settings: Any,
) -> Result: ...
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
) -> Result | Family:
    """Prune a model.

    Args:
        model: a folder, a hub id, or a model in memory, which stays as it is; None: the recipe names one.
        tokenizer: of a model in memory.
        recipe: a file, the folder of a pruned model, a preset by name, or a recipe.
        output: folder of the result; None: it stays in memory.
        quiet: whether nothing is said of the progress.
        progress: what is told of it instead.
        resume: whether to go on with an interrupted run of the same recipe.
        overwrite: whether a result in `output` may be replaced.
        settings: recipe keys: sparsity=0.5, pruner="obs", allocator={"name": "tyr", ...}, data={...}; a key of a
            nested part is written with two underscores, data__seqlen=256.

    Returns:
        The result; of a list of sparsities a family of them, for little more than the price of one.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
        PluginError: a plug-in broke its contract.

    Example:
        >>> small = prunekit.prune("my-model", sparsity=0.5)  # doctest: +SKIP
        >>> small.save("my-model-half")  # doctest: +SKIP
        >>> prunekit.prune("my-model", sparsity=[0.2, 0.3, 0.4, 0.5]).save("my-models")  # doctest: +SKIP
    """
    base, overrides, in_memory = _chosen(model, recipe, settings)
    several = base.spread(overrides)
    options: dict[str, Any] = {
        "model": in_memory,
        "tokenizer": tokenizer,
        "output": None if output is None else Path(output),
        "progress": progress or progress_for(quiet),
        "resume": resume,
        "overwrite": overwrite,
    }
    return run(base.with_overrides(overrides), **options) if several is None else run_all(several, **options)


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
    """Search for a better recipe. Needs the extra prunekit[optuna].

    The same call goes on with a study that was interrupted, or with more trials.

    Args:
        model: as of `prune`.
        tokenizer: of a model in memory.
        space: what may be chosen: a file, a preset by name, or recipe keys with their choices.
        trials: recipes to try, those of earlier runs of the study included.
        output: folder of the study.
        metric: one, or several, which make a front; all are better when lower.
        sampler: who proposes trials.
        recipe: what is tuned, as of `prune`.
        storage: URL of an Optuna storage; None: a journal in the folder.
        study_name: in that storage; None: that of the folder.
        quiet: whether nothing is said of the progress.
        progress: what is told of it instead.
        resume: whether to go on with a study that is there.
        overwrite: whether another study in `output` may be replaced.
        settings: recipe keys, as of `prune`.

    Returns:
        The study, its rows and the best recipe.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
        CannotGoOn: not one trial ended well.

    Example:
        >>> space = {"pruner": ["wanda", {"name": "obs", "aim": ["own", "stream"]}]}
        >>> tuned = prunekit.tune("my-model", space=space, output="study", recipe="fast")  # doctest: +SKIP
        >>> small = prunekit.prune(recipe=tuned.best)  # doctest: +SKIP
    """
    from prunekit.run import tune as tuning  # it needs an extra

    base, overrides, in_memory = _chosen(model, recipe, settings)
    return tuning.tune(
        base.with_overrides(overrides),
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
) -> tuple[Recipe, dict[str, Any], PreTrainedModel | None]:
    """The recipe, what of it is to be replaced, the model's name too, and the model where it is in memory."""
    base = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if isinstance(data := settings.pop("data", None), dict):
        settings |= {f"data__{key}": value for key, value in data.items()}
    overrides = {key.replace("__", "."): plain(value) for key, value in settings.items()}
    in_memory = model if isinstance(model, PreTrainedModel) else None
    if model is not None and in_memory is None:
        overrides["model"] = str(model)
    return base, overrides, in_memory
