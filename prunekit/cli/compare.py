"""`prunekit compare`: methods head to head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.completion import RECIPES, one_of, plugins, several_of
from prunekit.cli.options import (
    METHOD,
    RUN,
    TEXT,
    Dataset,
    Json,
    JsonLines,
    Quiet,
    Track,
    Trust,
    check_words,
    needed_model,
    option,
    split_assignments,
    split_datasets,
    switch,
    watched,
)
from prunekit.cli.quiet import quiet_libraries
from prunekit.errors import WrongInput

WHAT = "Models, by comma, and a suite: a YAML file or a preset that says what is compared."
SEVERAL = "Several by comma."


def compare(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL | SUITE.yaml", help=WHAT, show_default=False)
    ] = None,
    *,
    output: Annotated[Path | None, switch("Folder for the rows and the tables.", None, "--output", "-o")] = None,
    recipes: Annotated[
        str | None, option(f"Whole recipes. {SEVERAL}", METHOD, autocompletion=several_of(RECIPES))
    ] = None,
    pruners: Annotated[
        str | None, option(f"Pruners of the grid. {SEVERAL}", METHOD, autocompletion=several_of(plugins("pruner")))
    ] = None,
    allocators: Annotated[
        str | None,
        option(
            f"Allocators of it, each with every pruner. {SEVERAL}",
            METHOD,
            autocompletion=several_of(plugins("allocator")),
        ),
    ] = None,
    learners: Annotated[
        str | None,
        option(
            f"Learners, in the place of allocators or beside them. {SEVERAL}",
            METHOD,
            autocompletion=several_of(plugins("learner")),
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        option(f"Objectives, a third side of it. {SEVERAL}", METHOD, autocompletion=several_of(plugins("objective"))),
    ] = None,
    recipe: Annotated[
        str | None, option("Recipe that the cells of the grid differ from.", METHOD, autocompletion=one_of(RECIPES))
    ] = None,
    sparsity: Annotated[str | None, option(f"Shares to remove. {SEVERAL}", METHOD, metavar="SHARE")] = None,
    seeds: Annotated[
        int | None, option("How often every cell is run: with seeds 0, 1, up to N - 1.", METHOD, metavar="N", min=1)
    ] = None,
    speed: Annotated[
        bool | None,
        switch(
            "Prefill and decode of every small model, timed in turns with the dense one; off by default: it takes "
            "some 15 seconds a cell, and times are noisy.",
            METHOD,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, option("A recipe value for all cells. Repeatable.", METHOD, "--set", metavar="KEY=VALUE")
    ] = None,
    dataset: Dataset = None,
    evaluation: Annotated[str | None, option("Text to judge on; otherwise what follows in the other.", TEXT)] = None,
    seqlen: Annotated[int | None, option("Tokens in a window.", TEXT, metavar="N", min=2)] = None,
    time: Annotated[
        str | None, option("Time to spend, e.g. 2h: the better cells get more of it.", RUN, metavar="TIME")
    ] = None,
    engine: Annotated[
        str | None,
        option("Where the work is done: local, ray or ray://HOST:PORT.", RUN, autocompletion=one_of(plugins("engine"))),
    ] = None,
    disk: Annotated[float, option("Disk space for what cells share.", RUN, metavar="GB", min=0)] = 20,
    workers: Annotated[
        int, option("Processes that make cells side by side, on a share of --device each.", RUN, metavar="N", min=1)
    ] = 1,
    trust_remote_code: Trust = False,
    resume: Annotated[bool, switch("Continuation of an interrupted comparison.", RUN)] = True,
    overwrite: Annotated[bool, switch("Replacement of an earlier one in --output.", RUN, "--overwrite")] = False,
    json_: Json = False,
    track: Track = None,
    quiet: Quiet = False,
    json_lines: JsonLines = None,
) -> dict[str, Any]:
    """Compare methods on the same tokens, at the same price, judged on the same windows of text."""
    from prunekit.recipe.suite import AXES, Suite
    from prunekit.system.times import as_seconds

    models, files = list[str](), list[str]()
    for word in what or []:
        (files if Path(word).suffix in (".yaml", ".yml") or _is_suite(word) else models).append(word)
    if len(files) > 1:
        raise WrongInput(f"two suites were given, {files[0]} and {files[1]}; give one")
    found = Suite.load(files[0]).model_dump() if files else {}
    keys: dict[str, Any] = {"data.evaluation_dataset": evaluation, "data.seqlen": seqlen, "engine": engine}
    keys["data.dataset"] = split_datasets(dataset)
    assigned, trackers = split_assignments(set_, track)
    keys = {key: value for key, value in keys.items() if value is not None} | assigned
    if trust_remote_code:
        keys["trust_remote_code"] = True
    given: dict[str, Any] = {
        "models": [name for word in models for name in word.split(",")] or None,
        "recipes": _split(recipes), "pruners": _split(pruners), "allocators": _split(allocators),
        "learners": _split(learners), "objectives": _split(objectives), "recipe": recipe, "seeds": seeds,
        "speed": speed,
        "sparsity": None if sparsity is None else [_share(text) for text in sparsity.split(",")],
    }  # fmt: skip
    found |= {key: value for key, value in given.items() if value is not None}
    suite = Suite.of_mapping(found | {"set": {**found.get("set", {}), **keys}})
    for model in suite.models:
        needed_model(model, "prunekit compare MODEL --pruners a,b --output DIR")
    for cell in suite.every_cell():
        check_words(cell.recipe)
    check_words(suite.base())
    if output is None:
        raise WrongInput("no --output was given; name a new folder for the comparison")
    if not suite.models:
        raise WrongInput(f"no model was given; name one: prunekit compare MODEL {' '.join(f'--{a} a,b' for a in AXES)}")
    seconds = None if time is None else as_seconds(time)

    from prunekit.run.compare import compare as run
    from prunekit.run.session import Job

    quiet_libraries()
    with watched(quiet, trackers, output) as progress:
        job = Job(output=output, progress=progress, resume=resume, overwrite=overwrite)
        comparison = run(suite, job, time=seconds, disk=round(disk * 1e9), workers=workers)
    if json_:
        import json

        typer.echo(json.dumps(comparison.as_dict()))
    else:
        typer.echo(comparison.table())
        typer.echo(f"rows: {output / 'rows.jsonl'}")
    return {"output": output, "rows": output / "rows.jsonl", "summary": output / "summary.json"}


def _is_suite(word: str) -> bool:
    from prunekit.recipe.presets import presets
    from prunekit.recipe.suite import SUITES

    return word in presets(SUITES) and not Path(word).exists()


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [name for name in text.split(",") if name]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise typer.BadParameter(f"--sparsity {text!r} is no number between 0 and 1, the share that is removed")
    return share
