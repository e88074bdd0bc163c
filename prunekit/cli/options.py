"""Options that several commands share, and the recipe they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.errors import WrongInput

if TYPE_CHECKING:
    from prunekit.recipe.schema import Recipe

METHOD, TEXT, MACHINE, RUN = "Method", "Text", "Machine", "Run"  # headings of help pages

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Folder of a model, or its id on the hub.", show_default=False)
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Same as the argument.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any value of the recipe, e.g. damping=0.1 or pruner.refit=true. Repeatable.",
        rich_help_panel=METHOD,
    ),
]
Dataset = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="python-docs, a text, jsonl or parquet file, or a data set on the hub. Repeatable, or several by comma.",
        rich_help_panel=TEXT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No output except results and errors.", rich_help_panel=RUN)]

FLAGS: Mapping[str, str] = {  # of `prune` -> recipe key
    **{key: key for key in ("sparsity", "target", "pruner", "allocator", "objective", "carry", "structure")},
    **{key: key for key in ("seed", "engine", "device", "dtype", "memory")},
    **{key: f"data.{key}" for key in ("dataset", "calibration_tokens", "search_tokens", "seqlen")},
    "finisher": "finishers",
    "exporter": "exporters",
}


def parse_shares(text: str) -> float | list[float]:
    """One number, or several by comma.

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        message = f"{text!r} is no number between 0 and 1, nor several by comma"
        raise typer.BadParameter(message) from None
    return shares if len(shares) > 1 else shares[0]


def given_model(argument: str | None, option: str | None) -> str | None:
    """The model that was given, as argument or as option.

    Raises:
        WrongInput: two were given.
    """
    if argument is not None and option is not None and argument != option:
        raise WrongInput(f"two models were given, {argument!r} and --model {option!r}; give one")
    return argument if argument is not None else option


def needed_model(model: str | None, usage: str) -> str:
    """The model, which is there or may be on the hub; `usage` is the command with one.

    Raises:
        WrongInput: none was given, or a folder that is not there.
    """
    from prunekit.models.places import located

    if model is None:
        raise WrongInput(f"no model was given; name a folder or a hub id: {usage}")
    located(model)
    return model


def chosen_recipe(options: Mapping[str, Any], command: str) -> tuple[Recipe, str, bool]:
    """(the recipe that options of `prune` ask for, its model, whether it is the first of a family to be made).

    What can be refused without torch is refused first, so that a typing error is told at once.

    Raises:
        WrongInput: says what was asked, what there is and what to do.
    """
    from prunekit.plugins.registry import KINDS
    from prunekit.recipe.overrides import parsed
    from prunekit.recipe.schema import Recipe
    from prunekit.run.workplace import check_output

    for registry in KINDS:
        names = options.get(registry.kind)
        for name in [names] if isinstance(names, str) else names or []:
            if "://" not in name:  # an engine with its address
                _ = registry[name]
    given = {FLAGS[name]: value for name, value in options.items() if name in FLAGS}
    given["model"] = given_model(options["model"], options["model_option"])
    given["data.dataset"] = several_datasets(options["dataset"])
    given = {key: value for key, value in given.items() if value not in (None, [])}
    base, overrides = Recipe.load(options["recipe"]), given | dict(map(parsed, options["set_"] or []))
    several = base.spread(overrides)
    chosen = several or base.with_overrides(overrides)
    model = needed_model(chosen.model, f"prunekit {command} MODEL --output DIR")
    if command == "prune":  # a plan needs no place
        if options["output"] is None:
            raise WrongInput("no --output was given; name a new folder for the pruned model")
        check_output(options["output"], overwrite=options["overwrite"])

    from prunekit.recipe.resolve import resolve

    return resolve(chosen).recipe, model, several is not None


def several_datasets(names: Sequence[str] | None) -> list[str] | None:
    """Data sets, also those given by comma; a file may have commas in its name."""
    if not names:
        return None
    return [name for text in names for name in ([text] if Path(text).is_file() else text.split(","))]
