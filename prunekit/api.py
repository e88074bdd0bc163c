"""`prunekit.prune`, `prunekit.evaluate`, `prunekit.compare` and `prunekit.tune`: pruning from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from transformers import PreTrainedModel

from prunekit.errors import WrongInput
from prunekit.plugins.registry import plain
from prunekit.recipe.choices import Choices
from prunekit.recipe.schema import Recipe
from prunekit.recipe.suite import Suite
from prunekit.report.comparison import Comparison
from prunekit.run.family import Family
from prunekit.run.family import family as run_all
from prunekit.run.prune import prune as run
from prunekit.run.results import Result
from prunekit.run.session import Job
from prunekit.run.tracking import Spec, build_trackers, tracked
from prunekit.system.progress import Progress, progress_for
from prunekit.system.times import as_seconds

if TYPE_CHECKING:
    from prunekit.run.study import Tuned

Source = str | Path | PreTrainedModel | None


@overload
def prune(
    model: Source = None, tokenizer: Any = None, *, sparsity: list[float] | tuple[float, ...], **settings: Any
) -> Family: ...
@overload
def prune(model: Source = None, tokenizer: Any = None, *, sparsity: float = ..., **settings: Any) -> Result: ...
def prune(
    model: Source = None,
    tokenizer: Any = None,
    *,
    recipe: str | Path | Recipe = "default",
    output: str | Path | None = None,
    quiet: bool = False,
    progress: Progress | None = None,
    track: Spec | Sequence[Spec] = (),
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> Result | Family:
    """Prune a model.

    Args:
        model: a folder, a hub id, or a model in memory, which is not changed; None: the recipe names one.
        tokenizer: of a model in memory.
        recipe: a YAML file, the folder of a pruned model, a preset by name, or a recipe.
        output: folder of the result; None: it stays in memory.
        quiet: whether progress is not shown.
        progress: receives the progress instead of the terminal.
        track: trackers in which the run can be watched: names, {"name": ..., option: value}, or instances.
        resume: whether an interrupted run of the same recipe is continued.
        overwrite: whether an earlier result in `output` may be replaced.
        settings: recipe keys: sparsity=0.5, pruner="obs", allocator={"name": "tyr", ...}, data={...}; a key of a
            nested part is written with two underscores, data__seqlen=256. trust_remote_code=True allows code that comes
            with the model, which no file can allow.

    Returns:
        The result; for a list of sparsities a family of results, at little more than the cost of one.

    Raises:
        WrongInput: what cannot be done, what there is instead and what to do; before any long work.
        PluginError: a plug-in broke its contract.
        CannotGoOn: what was written is not the same model when it is loaded.

    Example:
        >>> small = prunekit.prune("my-model", sparsity=0.5)  # doctest: +SKIP
        >>> small.save("my-model-half")  # doctest: +SKIP
        >>> prunekit.prune("my-model", sparsity=[0.2, 0.3, 0.4, 0.5]).save("my-models")  # doctest: +SKIP
    """
    base, overrides, in_memory = _chosen(model, recipe, settings)
    several = base.spread(overrides)
    place = None if output is None else Path(output)
    with tracked(progress or progress_for(quiet), build_trackers(track), place) as told:
        job = Job(in_memory, tokenizer, place, told, resume, overwrite)
        return run(base.with_overrides(overrides), job) if several is None else run_all(several, job)


def tune(
    model: Source = None,
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
    track: Spec | Sequence[Spec] = (),
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> Tuned:
    """Search for a better recipe. Needs the extra prunekit[optuna].

    The same call continues a study that was interrupted, or adds trials to it.

    Args:
        model: as of `prune`.
        tokenizer: of a model in memory.
        space: choices to search: a YAML file, a preset by name, or recipe keys with their choices.
        trials: number of recipes to try, those of earlier runs of the study included.
        output: folder of the study.
        metric: what is minimised; several give a Pareto front.
        sampler: the algorithm that proposes trials.
        recipe: the recipe to improve, as of `prune`.
        storage: URL of an Optuna storage; None: a journal in the folder.
        study_name: in that storage; None: that of the folder.
        quiet: whether progress is not shown.
        progress: receives the progress instead of the terminal.
        track: trackers in which the run can be watched: names, {"name": ..., option: value}, or instances.
        resume: whether an earlier run of the study is continued.
        overwrite: whether another study in `output` may be replaced.
        settings: recipe keys, as of `prune`.

    Returns:
        The study, its rows and the best recipe.

    Raises:
        WrongInput: what cannot be done, what there is instead and what to do; before any long work.
        CannotGoOn: no trial was completed.

    Example:
        >>> space = {"pruner": ["wanda", {"name": "obs", "aim": ["own", "stream"]}]}
        >>> tuned = prunekit.tune("my-model", space=space, output="study", recipe="fast")  # doctest: +SKIP
        >>> small = prunekit.prune(recipe=tuned.best)  # doctest: +SKIP
    """
    from prunekit.run import tune as tuning  # it needs an extra

    base, overrides, in_memory = _chosen(model, recipe, settings)
    with tracked(progress or progress_for(quiet), build_trackers(track), Path(output)) as told:
        return tuning.tune(
            base.with_overrides(overrides),
            Choices.of_mapping(space) if isinstance(space, Mapping) else Choices.load(space),
            Job(in_memory, tokenizer, Path(output), told, resume, overwrite),
            trials=trials,
            metrics=(metric,) if isinstance(metric, str) else tuple(metric),
            sampler=sampler,
            storage=storage,
            study_name=study_name,
        )


def compare(
    model: str | Path | PreTrainedModel | Sequence[str | Path] | None = None,
    tokenizer: Any = None,
    *,
    suite: str | Path | Mapping[str, Any] | Suite | None = None,
    output: str | Path,
    time: str | float | None = None,
    workers: int = 1,
    quiet: bool = False,
    progress: Progress | None = None,
    track: Spec | Sequence[Spec] = (),
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> Comparison:
    """Compare methods on the same tokens, at the same price, judged on the same windows of text.

    The same call continues a comparison that was interrupted.

    Args:
        model: one, as of `prune`, or several folders or hub ids; None: the suite names them.
        tokenizer: of a model in memory.
        suite: what is compared: a YAML file, a preset by name, or what such a file says.
        output: folder for the rows and tables.
        time: to spend, as "2h" or in seconds; None: as long as it takes.
        workers: processes that make cells side by side, each with the model open and its share of devices, threads,
            memory and disk.
        quiet: whether progress is not shown.
        progress: receives the progress instead of the terminal.
        track: trackers in which the run can be watched: names, {"name": ..., option: value}, or instances.
        resume: whether an earlier comparison is continued.
        overwrite: whether another one in `output` may be replaced.
        settings: keys of a suite, as pruners=["obs", "wanda"], seeds=3, or speed=True to time every small model in
            turns with the dense one; all others are recipe keys for all cells, as of `prune`.

    Returns:
        All rows, and what can be said of them.

    Raises:
        WrongInput: what cannot be done, what there is instead and what to do; before any long work.

    Example:
        >>> found = prunekit.compare("my-model", recipes=["fast", "flap"], output="comparison")  # doctest: +SKIP
        >>> print(found.table())  # doctest: +SKIP
    """
    from prunekit.run import compare as comparing

    said = {key: settings.pop(key) for key in list(settings) if key in Suite.model_fields and key != "set"}
    if isinstance(data := settings.pop("data", None), dict):
        settings |= {f"data__{key}": value for key, value in data.items()}
    in_memory = model if isinstance(model, PreTrainedModel) else None
    if model is not None and not isinstance(model, PreTrainedModel):
        said["models"] = [str(name) for name in ([model] if isinstance(model, str | Path) else model)]
    found: dict[str, Any] = {}
    if isinstance(suite, Mapping):
        found = dict(suite)
    elif suite is not None:
        found = (suite if isinstance(suite, Suite) else Suite.load(suite)).model_dump()
    keys = {key.replace("__", "."): plain(value) for key, value in settings.items()}
    chosen = Suite.of_mapping({**found, **said, "set": {**found.get("set", {}), **keys}})
    with tracked(progress or progress_for(quiet), build_trackers(track), Path(output)) as told:
        job = Job(in_memory, tokenizer, Path(output), told, resume, overwrite)
        return comparing.compare(chosen, job, time=as_seconds(time), workers=workers)


def evaluate(
    model: str | Path | PreTrainedModel,
    tokenizer: Any = None,
    *,
    against: str | Path | PreTrainedModel | None = None,
    harness: str | Path | Sequence[str | Path] | None = None,
    harness_path: str | Path | None = None,
    chat_template: bool = False,
    limit: int | None = None,
    batch_size: int | None = None,
    dataset: str | Path = "python-docs",
    split: str | None = None,
    field: str | None = None,
    seqlen: int | None = None,
    tokens: int | None = None,
    samples: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure perplexity, size and speed of a model, dense or pruned, and how well it does tasks.

    Args:
        model: a folder or hub id of any causal language model that transformers loads, or one in memory.
        tokenizer: of models in memory.
        against: a second model, such as the dense one, judged on the same text and tasks.
        harness: tasks of lm-evaluation-harness: names, `pruning-suite`, or task files. Needs the extra
            prunekit[harness].
        harness_path: folder of task files, whose tasks `harness` names.
        chat_template: whether prompts of tasks are messages, by the tokenizer's chat template.
        limit: items of each task, from its first; None: all.
        batch_size: prompts of tasks in a forward pass; None: as many as keep the logits small.
        dataset: the text of the perplexity, as of the recipe.
        split: of the data set; None: a held-out one.
        field: of rows that holds the text; None: what there is.
        seqlen: tokens of a window; None: 2048, or the model's maximum.
        tokens: from the start of the text; None: 65,536, or all that there are.
        samples: number of prompts that the model continues; at most 10.
        device: auto, cpu, cuda or cuda:1; models in memory stay where they are.
        dtype: of the computation; auto: float32 on a CPU, else that of the checkpoint.
        trust_remote_code: whether code that comes with the model, or with task files, may run.
        quiet: whether progress is not shown.
        progress: receives the progress instead of the terminal.

    Returns:
        What `prunekit evaluate --json` prints.

    Raises:
        WrongInput: what cannot be done, what there is instead and what to do; before any long work.
        ImportError: tasks are asked for and the harness is not installed.

    Example:
        >>> found = prunekit.evaluate("half", against="my-model", harness="pruning-suite")  # doctest: +SKIP
        >>> found["harness"]["means"]["acc"]["difference"]  # doctest: +SKIP
    """
    from prunekit.data.harness import HarnessSpec
    from prunekit.data.spec import DataSpec
    from prunekit.measure.evaluate import evaluate as measure

    names = [harness] if isinstance(harness, str | Path) else harness
    spec = None
    if names or harness_path or chat_template or limit or batch_size:
        folder = None if harness_path is None else str(harness_path)
        spec = HarnessSpec(tuple(map(str, names or ())), folder, chat_template, limit, batch_size)
    data = DataSpec(
        dataset=str(dataset), split=split, evaluation_split=split, field=field, seqlen=seqlen, evaluation_tokens=tokens
    )
    first, second = (str(each) if isinstance(each, Path) else each for each in (model, against))
    return measure(
        first,  # type: ignore[arg-type]
        data,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        against=second,
        prompts=samples,
        harness=spec,
        progress=progress or progress_for(quiet),
    )


def _chosen(
    model: Source, recipe: str | Path | Recipe, settings: dict[str, Any]
) -> tuple[Recipe, dict[str, Any], PreTrainedModel | None]:
    """(the recipe, the values to replace in it, the model's name among them, the model where it is in memory)."""
    said = "trust_remote_code" in settings
    base = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, trust_remote_code=said)
    if isinstance(data := settings.pop("data", None), dict):
        settings |= {f"data__{key}": value for key, value in data.items()}
    overrides = {key.replace("__", "."): plain(value) for key, value in settings.items()}
    if model is None or isinstance(model, PreTrainedModel):
        return base, overrides, model
    if not isinstance(model, str | Path):
        raise WrongInput(
            f"a {type(model).__name__} is no model of transformers; give a PreTrainedModel, with adapters merged, a "
            "folder or a hub id"
        )
    return base, overrides | {"model": str(model)}, None
