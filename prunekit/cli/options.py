"""Options that several commands share, and the recipe that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from prunekit.cli.completion import one_of, plugins, several_of
from prunekit.cli.errors import begin_events
from prunekit.errors import WrongInput, unknown

if TYPE_CHECKING:
    from prunekit.recipe.schema import Recipe
    from prunekit.run.session import Job
    from prunekit.system.progress import Progress

METHOD, SEARCH, TEXT, MACHINE, RUN = "Method", "Search", "Text", "Machine", "Run"  # headings of help pages


def option(help: str, heading: str | None = None, *names: str, metavar: str | None = "NAME", **more: Any) -> Any:
    """Describe an option with a value.

    Args:
        help: a noun phrase.
        heading: of its part of the help page; None: the first part.
        names: on the command line; without them, that of the parameter.
        metavar: stands for the value; None: its type does.
        more: as of `typer.Option`.
    """
    return typer.Option(*names, help=help, rich_help_panel=heading, metavar=metavar, **more)


def switch(help: str, heading: str | None = None, *names: str) -> Any:
    """Describe an option without a value."""
    return option(help, heading, *names, metavar=None)


Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Folder of a model, or its id on the hub.", show_default=False)
]
ModelOption = Annotated[str | None, option("Same as the argument.", None, "--model", metavar="MODEL")]
SET_HELP = "Any value of the recipe, e.g. damping=0.1 or pruner.refit=true. Repeatable."
Set = Annotated[list[str] | None, option(SET_HELP, METHOD, "--set", metavar="KEY=VALUE")]
DATASET_HELP = "python-docs, a text, jsonl or parquet file, general or another data set on the hub."
Dataset = Annotated[list[str] | None, option(f"{DATASET_HELP} Repeatable, or several by comma.", TEXT)]
TRUST = "Permission to run code that comes with the model."
Trust = Annotated[bool, switch(TRUST, None, "--trust-remote-code")]
DTYPES, DEVICES = ("auto", "float32", "bfloat16", "float16", "float64"), ("auto", "cpu", "cuda")
CARRIES = ("dense", "centre", "expected")
DTYPE = option(
    "Number format of the computation: auto, float32, bfloat16, float16 or float64.",
    MACHINE,
    autocompletion=one_of(lambda: DTYPES),
)
TRACK = (
    "Program to watch the run in: tensorboard, wandb or mlflow. Repeatable, or several by comma; its options are "
    "--set tracker.NAME.option=value."
)
Track = Annotated[list[str] | None, option(TRACK, RUN, "--track", autocompletion=several_of(plugins("tracker")))]
Json = Annotated[bool, switch("JSON instead of a table.", None, "--json")]
Quiet = Annotated[bool, switch("No output except results and errors.", RUN, "--quiet", "-q")]
JSON_LINES = (
    "Progress for programs, one JSON object a line: a file, or the number of an open descriptor; 2 is standard error, "
    "which then holds nothing else."
)
JsonLines = Annotated[
    str | None, option(JSON_LINES, RUN, "--json-lines", metavar="PLACE", callback=begin_events, is_eager=True)
]
"""What a command with it returns is the result in the last event."""


@contextmanager
def watched(quiet: bool, specs: Sequence[Mapping[str, Any]], output: Path) -> Iterator[Progress]:
    """Tell the user, programs and trackers how a command goes on.

    Args:
        quiet: whether the user sees nothing.
        specs: what trackers are built from.
        output: folder of the command.

    Raises:
        WrongInput, ImportError: a tracker cannot work here.
    """
    from prunekit.run.tracking import build_trackers, tracked
    from prunekit.system.progress import progress_for

    with tracked(progress_for(quiet), build_trackers(specs), output) as progress:
        yield progress


@dataclass(frozen=True)
class Work:
    """What commands that work on a model in a folder are asked in the same words."""

    model: Model = None
    model_option: ModelOption = None
    output: Path | None = None
    set_: Set = None
    trust_remote_code: Trust = False
    dataset: Dataset = None
    resume: bool = True
    overwrite: bool = False
    track: Track = None
    quiet: Quiet = False
    json_lines: JsonLines = None

    def overrides(self, **flags: Any) -> dict[str, Any]:
        """Write what was given as dotted recipe keys.

        Args:
            flags: recipe key -> value of further options; None: it was not given.

        Raises:
            WrongInput: two models were given, or --set is no assignment.
        """
        given = {"model": given_model(self.model, self.model_option), "data.dataset": split_datasets(self.dataset)}
        given = {key: value for key, value in (given | flags).items() if value is not None}
        return given | allowed(self.trust_remote_code) | split_assignments(self.set_, self.track)[0]

    def place(self, what: str) -> Path:
        """The folder to work in.

        Args:
            what: is made in it.

        Raises:
            WrongInput: none was given.
        """
        if self.output is None:
            raise WrongInput(f"no --output was given; name a new folder for {what}")
        return self.output

    @contextmanager
    def job(self, **more: Any) -> Iterator[Job]:
        """Ask for a run in the folder; the user, programs and trackers are told of it.

        Args:
            more: fields of the job.

        Raises:
            WrongInput, ImportError: a tracker cannot work here.
        """
        from prunekit.run.session import Job

        assert self.output is not None
        with watched(self.quiet, split_assignments(self.set_, self.track)[1], self.output) as progress:
            yield Job(output=self.output, progress=progress, resume=self.resume, overwrite=self.overwrite, **more)


def works(what: str, run: str = "run") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command, whose first parameter is a `Work`, the options of one.

    Args:
        what: is made in the folder.
        run: that may be interrupted.
    """
    hints = get_type_hints(Work, include_extras=True)
    hints |= {
        "output": Annotated[Path | None, switch(f"Folder for {what}.", None, "--output", "-o")],
        "resume": Annotated[bool, switch(f"Continuation of an interrupted {run}.", RUN)],
        "overwrite": Annotated[bool, switch("Replacement of an earlier one in --output.", RUN, "--overwrite")],
    }
    shared = {
        field.name: Parameter(
            field.name,
            Parameter.KEYWORD_ONLY if field.name != "model" else Parameter.POSITIONAL_OR_KEYWORD,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(Work)
    }
    front = ("model", "model_option", "output")

    def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
        own = list(signature(command, eval_str=True).parameters.values())[1:]

        @wraps(command)
        def called(**given: Any) -> Any:
            work = Work(**{name: given.pop(name) for name in shared if name in given})
            return command(work, **given)

        del called.__wrapped__  # type: ignore[attr-defined]  # its signature is not that of the command
        order = [*(shared[name] for name in front), *own, *(shared[name] for name in shared if name not in front)]
        called.__signature__ = Signature(order)  # type: ignore[attr-defined]
        called.__annotations__ = {each.name: each.annotation for each in order} | {"return": dict[str, Any]}
        return called

    return with_options


EFFORTS: Mapping[str, str] = {"quick": "fast", "standard": "default", "thorough": "default-recover"}
"""A word for how much work a result is worth -> the recipe that does so much."""

FLAGS: Mapping[str, str] = {  # of `prune` -> recipe key
    **{key: key for key in ("sparsity", "target", "pruner", "allocator", "learner", "width", "objective")},
    **{key: key for key in ("carry", "structure")},
    **{key: key for key in ("time", "seed", "engine", "device", "dtype", "memory")},
    **{key: f"data.{key}" for key in ("dataset", "calibration_tokens", "search_tokens", "seqlen")},
    "finisher": "finishers",
    "exporter": "exporters",
}


def parse_shares(text: str) -> float | list[float]:
    """Parse one number, or several by comma.

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number between 0 and 1, nor several by comma") from None
    return shares if len(shares) > 1 else shares[0]


def given_model(argument: str | None, option: str | None) -> str | None:
    """Choose the model that was given, as argument or as option.

    Raises:
        WrongInput: two were given.
    """
    if argument is not None and option is not None and argument != option:
        raise WrongInput(f"two models were given, {argument!r} and --model {option!r}; give one")
    return argument if argument is not None else option


def needed_model(model: str | None, usage: str) -> str:
    """Check that there is a model: a folder, or perhaps an id on the hub.

    Args:
        model: as it was given.
        usage: the command with a model, for the message.

    Raises:
        WrongInput: none was given, or a folder that is not there.
    """
    from prunekit.models.places import located

    if model is None:
        raise WrongInput(f"no model was given; name a folder or a hub id: {usage}")
    located(model)
    return model


def choose_recipe(options: Mapping[str, Any], command: str) -> tuple[Recipe, str, bool]:
    """Make the recipe that the options of `prune` ask for.

    What can be refused without torch is refused here, so that a typing error is answered at once.

    Args:
        options: of `prune`, by parameter.
        command: `prune` or `plan`, which needs no output.

    Returns:
        The recipe, its model, and whether it is the first of a family that is asked for.

    Raises:
        WrongInput: what was asked, what there is and what to do.
    """
    from prunekit.recipe.schema import Recipe
    from prunekit.run.workplace import check_output

    given = {FLAGS[name]: value for name, value in options.items() if name in FLAGS}
    given["model"] = given_model(options["model"], options["model_option"])
    given["data.dataset"] = split_datasets(options["dataset"])
    given["exporters"] = split_names(given["exporters"])
    given = {key: value for key, value in given.items() if value not in (None, [])}
    assigned, _ = split_assignments(options["set_"], options.get("track"))
    overrides = given | allowed(options["trust_remote_code"]) | assigned
    base = Recipe.load(_recipe_of(options), trust_remote_code="trust_remote_code" in overrides)
    several = base.spread(overrides)
    chosen = several or base.with_overrides(overrides)
    check_words(chosen)
    model = needed_model(chosen.model, f"prunekit {command} MODEL --output DIR")
    if command == "prune":
        if options["output"] is None:
            raise WrongInput("no --output was given; name a new folder for the pruned model")
        check_output(options["output"], overwrite=options["overwrite"])
    return chosen, model, several is not None


def split_assignments(
    set_: Sequence[str] | None, track: Sequence[str] | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read what --set says, of the recipe and of trackers.

    Args:
        set_: as it was given.
        track: names of trackers, as they were given.

    Returns:
        (dotted recipe key -> value, what every tracker is built from).

    Raises:
        WrongInput: no such tracker, or an option of one that was not asked for.
    """
    from prunekit.recipe.overrides import parsed
    from prunekit.run.tracking import split_options, tracker_specs

    values, options = split_options(dict(map(parsed, set_ or [])))
    return values, tracker_specs(split_names(track) or [], options)


def _recipe_of(options: Mapping[str, Any]) -> str:
    """The recipe that was named, or the one that does as much as was asked for."""
    recipe, effort = options["recipe"], options["effort"]
    if effort is None:
        return recipe or "default"
    if recipe is not None:
        raise WrongInput(f"both a recipe, {recipe!r}, and an effort, {effort!r}, were given; give one of them")
    if effort not in EFFORTS:
        raise WrongInput(unknown("effort", effort, EFFORTS))
    return EFFORTS[effort]


def allowed(trust_remote_code: bool) -> dict[str, Any]:
    """The recipe key of a permission, where it was given."""
    return {"trust_remote_code": True} if trust_remote_code else {}


def check_words(recipe: Recipe) -> None:
    """Refuse a plug-in, structure, device or amount of memory that does not exist, without loading torch.

    Raises:
        WrongInput: what was asked and what there is.
    """
    from prunekit.models.places import check_device
    from prunekit.plugins.registry import KINDS
    from prunekit.space.forms import parse_form
    from prunekit.system.sizes import parse_size

    kinds = ("pruner", "allocator", "learner", "width", "objective", "engine")
    specs = {kind: [spec] for kind in kinds if (spec := getattr(recipe, kind)) is not None}
    specs |= {"finisher": recipe.finishers, "exporter": recipe.exporters, "metric": [recipe.metric_spec]}
    for registry in KINDS:
        for spec in specs.get(registry.kind, ()):
            if isinstance(name := spec.get("name"), str):  # else it is refused where it is built
                _ = registry[name]
    parse_form(recipe.structure)
    parse_size(recipe.memory)
    for device in recipe.device.split(","):
        check_device(device.strip())


def split_names(names: Sequence[str] | None) -> list[str] | None:
    """Split names that are given one by one or by comma, each once."""
    found = [name.strip() for text in names or () for name in text.split(",")]
    return list(dict.fromkeys(filter(None, found))) or None


def split_datasets(names: Sequence[str] | None) -> list[str] | None:
    """Split data sets that are given by comma; a file may have commas in its name."""
    from prunekit.data.rows import what_is

    if not names:
        return None
    return [name for text in names for name in ([text] if what_is(text) == "file" else text.split(","))]
