"""The command line: prune, plan, tune, evaluate, list, check, demo.

Nothing heavy is imported before it is needed, so help and wrong flags answer at once. Wrong input is one
sentence on stderr and exit code 2.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from prunekit.errors import CannotGoOn, WrongInput

if TYPE_CHECKING:
    from rich.table import Table

    from prunekit.plugins.registry import Registry
    from prunekit.recipe.schema import Recipe
    from prunekit.run.tune import Tuned

BROKEN, WRONG, INTERRUPTED = 1, 2, 130  # exit codes
SUITES = {
    "pruner": "PrunerSuite",
    "signal": "SignalSuite",
    "allocator": "AllocatorSuite",
    "objective": "ObjectiveSuite",
    "finisher": "FinisherSuite",
    "engine": "EngineSuite",
    "adapter": "AdapterSuite",
}  # in prunekit.testing


class _Sentences(TyperGroup):
    """Turns what the user got wrong into a sentence, whichever command it happened in."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (WrongInput, ImportError) as error:
            raise _ended(str(error), WRONG) from error
        except PermissionError as error:
            raise _ended(f"{error.filename}: permission denied; choose another place", WRONG) from error
        except CannotGoOn as error:
            raise _ended(str(error), BROKEN) from error
        except KeyboardInterrupt as error:
            again = "; the same command goes on from here" if ctx.invoked_subcommand in ("prune", "tune") else ""
            raise _ended(f"interrupted{again}", INTERRUPTED) from error
        except Exception as error:
            # safetensors says so in words alone
            if getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error):
                raise _ended("the disk is full; make room, and the same command goes on from here", BROKEN) from error
            if hasattr(error, "format_message"):  # a wrong flag: the parser's own errors are not public
                raise _ended(error.format_message(), WRONG) from error  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    cls=_Sentences,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prune language models: any pruner, any allocator, any objective; a smaller model that loads anywhere.",
)


def main() -> None:
    """The console script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunekit {metadata.version('prunekit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a fork after use would warn


def _shares(text: str) -> float | list[float]:
    """One number, or several by comma."""
    shares = [float(share) for share in text.split(",")]
    return shares if len(shares) > 1 else shares[0]


Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="Folder, or id on the hub.", show_default=False)]
ModelOption = Annotated[str | None, typer.Option("--model", help="The same as MODEL.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any value of the recipe: damping=0.1, pruner.refit=true. Repeatable."
    ),
]
Dataset = Annotated[
    list[str] | None,
    typer.Option(help="python-docs, a text/jsonl/parquet file, or on the hub. Repeatable, or several by comma."),
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="METRIC=SHARE",
        help="What stays, instead of --sparsity: latency=0.6, measured here; parameters=0.5; bytes, flops, kv-cache. "
        "Several shares by comma make a family.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.")]


@app.command()
def prune(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    sparsity: Annotated[
        Any,
        typer.Option(
            parser=_shares,
            metavar="SHARE[,SHARE...]",
            help="Of the blocks' parameters (of structure weights: of their linear maps' weights) to remove; "
            "several make a family of models.",
            show_default=False,
        ),
    ] = None,
    target: Target = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the result.")] = None,
    recipe: Annotated[str, typer.Option(help="A YAML file, the folder of a pruned model, or a preset.")] = "default",
    pruner: Annotated[str | None, typer.Option(help="Decides what to keep in one layer.")] = None,
    allocator: Annotated[str | None, typer.Option(help="Decides how much each layer keeps.")] = None,
    objective: Annotated[str | None, typer.Option(help="Judges allocations.")] = None,
    finisher: Annotated[
        list[str] | None,
        typer.Option(help="Polishes the small model; in the order given, in place of the recipe's. Repeatable."),
    ] = None,
    carry: Annotated[str | None, typer.Option(help="Activations for the next block: dense, centre, expected.")] = None,
    structure: Annotated[
        str | None, typer.Option(help="What is removed: groups, weights, or all but N of every M: 2:4.")
    ] = None,
    dataset: Dataset = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Tokens to measure layers on.")] = None,
    search_tokens: Annotated[int | None, typer.Option(help="Tokens to judge allocations on.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed, the same model.")] = None,
    engine: Annotated[str | None, typer.Option(help="Where the work is done: local, ray, ray://host:port.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1; several by comma.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation: auto, float32, bfloat16, ...")] = None,
    memory: Annotated[
        str | None, typer.Option(help="To get along with, as 8GiB; auto: what the machine has to spare.")
    ] = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run of the same recipe.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --output holds.")] = False,
    quiet: Quiet = False,
) -> None:
    """Make a smaller model. Every option but MODEL and --output has a default, from the recipe."""
    chosen, source, several = _chosen(locals(), "prune")
    if output is None:
        raise WrongInput("no --output was given; name a new folder for the pruned model")

    from prunekit.report.document import gained, kept_promise
    from prunekit.run import pipeline
    from prunekit.system.progress import progress_for

    _calm()
    if several:
        from prunekit.run.family import FILE, family

        found = family(chosen, output=output, progress=progress_for(quiet), resume=resume, overwrite=overwrite)
        _print(members(str(output), found.document))
        typer.echo(f"in numbers: {output / FILE}")
        return
    result = pipeline.prune(chosen, output=output, progress=progress_for(quiet), resume=resume, overwrite=overwrite)
    _print(comparison(str(output), *_from_report(result.report, source, output)))
    if "weights" in result.report:
        typer.echo(gained(result.report["weights"]))
    if "latency" in result.report:
        typer.echo(kept_promise(result.report["latency"]))


def _as_prune(body: Callable[[Mapping[str, Any], bool], None]) -> Callable[..., None]:
    """A command with the options of `prune`, whatever they are, and --json."""

    def command(**options: Any) -> None:
        body(options, options.pop("as_json"))

    as_prune = inspect.signature(prune, eval_str=True)
    printed = Annotated[bool, typer.Option("--json", help="Print JSON.")]
    as_json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=printed)
    signature = as_prune.replace(parameters=[*as_prune.parameters.values(), as_json])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    command.__name__, command.__doc__ = body.__name__, body.__doc__
    return command


@app.command()
@_as_prune
def plan(options: Mapping[str, Any], as_json: bool) -> None:
    """What `prune` with the same options will take on this machine: memory, disk and time of every stage."""
    chosen, source, several = _chosen(options, "plan")
    from prunekit.models.opening import skeleton
    from prunekit.run.pipeline import foreseen
    from prunekit.run.plan import Rates
    from prunekit.system.memory import amount
    from prunekit.system.progress import span

    _calm()
    output = options["output"] or Path("prunekit-output")  # a run without --output is refused; its disk is this one's
    asked = [member.sparsity for member in chosen.members] if several else None
    shape = skeleton(source, trust_remote_code=chosen.trust_remote_code)
    found = foreseen(chosen, *shape, output, asked, rehearse=True)
    rates = Rates.measured(found.device, found.dtype, found.place or Path())
    if as_json:
        typer.echo(json.dumps(found.as_dict(rates), indent=2))
        found.check()
        return
    table = _table(source, "memory", "disk", "time", "and")
    for stage in found.stages:
        seconds = stage.seconds(rates)
        took = "unknown" if seconds is None else span(seconds)
        table.add_row(stage.name, amount(stage.memory + stage.shared), amount(stage.disk), took, stage.unknown)
    told = found.as_dict(rates)
    least = "" if told["seconds_complete"] else "at least "
    for own in told["members"]:
        table.add_row(f"{own['sparsity']} alone", "", amount(own["disk"]), least + span(own["seconds_known"]), "")
    table.add_row("in all", amount(told["memory"]), amount(told["disk"]), least + span(told["seconds_known"]), "")
    _print(table)
    how = f"block by block, {amount(found.block)} each" if found.paged else "whole"
    typer.echo(
        f"the model is opened {how}; there are {amount(max(0, found.limit))} of memory beside the process itself"
        f" and {amount(found.free_disk or 0)} of disk"
    )
    typer.echo(
        f"counted at {rates.flops / 1e9:,.0f} GFLOP/s of products in {str(found.dtype)[6:]}, "
        f"{rates.doubles / 1e9:,.0f} in float64, {rates.write / 1e6:,.0f} MB/s written and {rates.read / 1e6:,.0f} read"
    )
    found.check()


@app.command()
def tune(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the study.")] = None,
    recipe: Annotated[str, typer.Option(help="What is tuned: a YAML file, a folder, or a preset.")] = "default",
    space: Annotated[str, typer.Option(help="What may be chosen: a YAML file, or a preset.")] = "default",
    trials: Annotated[int, typer.Option(min=1, help="Recipes to try, earlier runs included.")] = 50,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="perplexity, loss, objective, parameters, seconds; repeatable, then there is a front."),
    ] = None,
    sampler: Annotated[str, typer.Option(help="Who proposes trials: tpe, nsga-ii, nsga-iii.")] = "tpe",
    storage: Annotated[str | None, typer.Option(help="Of Optuna, as sqlite:///my.db; study.log in the folder.")] = None,
    study_name: Annotated[str | None, typer.Option(help="In that storage; the name of the folder.")] = None,
    disk: Annotated[float, typer.Option(min=0, help="GB of candidates to keep for later trials.")] = 20,
    sparsity: Annotated[float | None, typer.Option(help="Share of the parameters of all blocks to remove.")] = None,
    dataset: Dataset = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted study.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the study in --output.")] = False,
    quiet: Quiet = False,
) -> None:
    """Search for a better recipe. Trials are judged on the search text, never on the test text."""
    from prunekit.recipe.choices import Choices
    from prunekit.recipe.overrides import parsed
    from prunekit.recipe.schema import Recipe

    flags = {"model": _model(model, model_option), "sparsity": sparsity, "data.dataset": _several(dataset)}
    given = {key: value for key, value in flags.items() if value is not None}
    chosen = Recipe.load(recipe).with_overrides(given | dict(map(parsed, set_ or [])))
    choices = Choices.load(space)
    if chosen.model is None:
        raise WrongInput("no model was given; name a folder or a hub id: prunekit tune MODEL --output DIR")
    if output is None:
        raise WrongInput("no --output was given; name a new folder for the study")

    from prunekit.run import tune as tuning
    from prunekit.system.progress import progress_for

    _calm()
    tuned = tuning.tune(
        chosen,
        choices,
        trials=trials,
        output=output,
        metrics=[name for text in metric or ["perplexity"] for name in text.split(",")],
        sampler=sampler,  # type: ignore[arg-type]  # checked there
        storage=storage,
        study_name=study_name,
        progress=progress_for(quiet),
        resume=resume,
        overwrite=overwrite,
        disk=round(disk * 1e9),
    )
    _print(standings(tuned))
    typer.echo(f"the best: prunekit prune --recipe {output / 'best.yaml'} --output DIR")
    typer.echo(f"all trials: optuna-dashboard {storage or output / 'study.log'}")


@app.command()
def evaluate(
    model: Model = None,
    *,
    model_option: ModelOption = None,
    dataset: Annotated[
        str, typer.Option(help="python-docs, a text/jsonl/parquet file, or on the hub.")
    ] = "python-docs",
    split: Annotated[str | None, typer.Option(help="Of the data set; a held-out one where there is.")] = None,
    field: Annotated[str, typer.Option(help="Where jsonl, parquet and hub rows have their text.")] = "text",
    seqlen: Annotated[int | None, typer.Option(min=2, help="Tokens per window; 2048, or the model's.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="The first so many tokens of the text.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the computation: auto, float32, bfloat16, ...")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model.")] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another model, timed in turns with this one.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity, size and speed of a model, dense or pruned."""
    name = _model(model, model_option)
    if name is None:
        raise WrongInput("no model was given; name a folder or a hub id: prunekit evaluate MODEL")
    from prunekit.measure.evaluate import evaluate as measure
    from prunekit.measure.rounds import Ratio
    from prunekit.system.progress import progress_for

    _calm()
    found = measure(
        name,
        dataset,
        split=split,
        field=field,
        seqlen=seqlen,
        tokens=tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        against=against,
        progress=progress_for(quiet),
    )
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = _table(name)
    table.add_row("perplexity", f"{found['perplexity']:.2f}")
    table.add_row("loss", f"{found['nll']:.4f} ± {found['standard_error']:.4f} nats per token")
    table.add_row("measured as", found["label"])
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("weights", _bytes(found["bytes"]))
    table.add_row("zeros", f"{found['zeros']:.2%} of the weights of linear maps")
    for what in ("prefill", "decode"):
        low, high = found[f"{what}_tokens_per_second_middle_half"]
        middle = f"tokens/s, half of the rounds {low:,.1f} to {high:,.1f}"
        table.add_row(what, f"{found[f'{what}_tokens_per_second']:,.1f} {middle}")
        if (other := found.get("against")) is not None:
            ratio = Ratio(other[f"{what}_ratio"], *other[f"{what}_ratio_interval"])
            table.add_row(f"{what}, ratio", f"{ratio}; {against} has {other[f'{what}_tokens_per_second']:,.1f}")
    table.add_row("timed as", found["timed"])
    _print(table)


@app.command(name="list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Every plug-in: kind, name, owner, what it does, its options."""
    rows = [_described(entry) for registry in _kinds() for entry in registry.values()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, default=str))
        return
    from rich.markup import escape
    from rich.table import Table

    from prunekit.recipe.choices import SPACES
    from prunekit.recipe.presets import presets

    table = Table(
        "kind", "name", "what it does", "options", "owner", box=None, header_style="bold", padding=(0, 2, 0, 0)
    )
    for row in rows:
        options = "\n".join(f"{o['name']}: {o['type']} = {_short(o['default'])}" for o in row["options"])
        table.add_row(*(escape(text) for text in (row["kind"], row["name"], row["summary"], options, row["owner"])))
    for name in presets():
        table.add_row("recipe", name, f"prunekit prune MODEL --recipe {name}", "", "")
    for name in presets(SPACES):
        table.add_row("space", name, f"prunekit tune MODEL --space {name}", "", "")
    _print(table)


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A pruner, signal, allocator, objective, finisher, engine or adapter.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="An option of the plug-in. Repeatable.")
    ] = None,
) -> None:
    """Run the conformance suite on a plug-in."""
    from prunekit.errors import unknown
    from prunekit.recipe.overrides import parsed

    found = [registry for registry in _kinds() if name in list(registry)]
    if not found:
        raise WrongInput(unknown("plug-in", name, {n for registry in _kinds() for n in registry}))
    registry = next((r for r in found if r.kind in SUITES), None)
    if registry is None:
        raise WrongInput(f"there is no suite for a {found[0].kind}; there are suites for every {', '.join(SUITES)}")
    for needed in ("pytest", "hypothesis"):
        if find_spec(needed) is None:
            raise WrongInput(f"the suites need {needed}, which is not installed: pip install 'prunekit[testing]'")
    spec = {"name": name, **dict(map(parsed, set_ or []))}
    registry.build(spec)  # a wrong option is the user's mistake, not the plug-in's
    raise typer.Exit(_passes(registry, spec))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")] = Path("demo-output"),
    quiet: Quiet = False,
) -> None:
    """Prune the bundled model to half of its blocks, offline, and compare."""
    from prunekit.demo.run import run
    from prunekit.system.progress import progress_for

    _calm()
    found = run(output, progress_for(quiet))
    _print(comparison(str(output), found.dense, found.pruned, found.speed))
    typer.echo("speed: " + found.timed.replace("; ", "\n  "))
    typer.echo(f"loaded back in a fresh process: logits differ by at most {found.difference:.1e}")


# -- tables -------------------------------------------------------------------------------------------


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:,.4g} GB"


ROWS: Mapping[str, Callable[[float], str]] = {
    "parameters": "{:,.0f}".format,
    "block parameters": "{:,.0f}".format,
    "not zero in linear maps": "{:,.0f}".format,
    "perplexity": "{:,.2f}".format,
    "size on disk": _bytes,
    "milliseconds": "{:,.4g}".format,
}


def comparison(
    title: str, dense: Mapping[str, float], pruned: Mapping[str, float], more: Sequence[Sequence[str]] = ()
) -> Table:
    """Dense against pruned; keys are those of `ROWS`, what was not measured is left out; and rows ready-made."""
    table = _table(title, "dense", "pruned", "ratio")
    for row, text in ROWS.items():
        if row in dense and row in pruned:
            ratio = f"{pruned[row] / dense[row]:.3f}" if dense[row] else ""
            table.add_row(row, text(dense[row]), text(pruned[row]), ratio)
    for cells in more:
        table.add_row(*cells)
    return table


def members(title: str, document: Mapping[str, Any]) -> Table:
    """A family, by ascending sparsity; * is on the front."""
    table = _table(title, "", "sparsity", "parameters", "perplexity", "token-forwards", "seconds")
    dense = document["dense"]
    table.add_row("dense", "", "", f"{dense['parameters']:,}", f"{dense['perplexity']:,.2f}")
    for row in document["members"]:
        numbers = f"{row['parameters']:,}", f"{row['perplexity']:,.2f}", f"{row['token_forwards']:,}"
        table.add_row(
            row["folder"], "*" if row["front"] else "", f"{row['realised']:.4f}", *numbers, f"{row['seconds']:,.0f}"
        )
    table.add_row("in all", *[""] * 4, f"{document['token_forwards']:,}", f"{document['seconds']:,.0f}")
    return table


def standings(tuned: Tuned, most: int = 12) -> Table:
    """The base recipe and the best trials, the front first, then by the first metric; what failed is counted."""
    table = _table("recipe", "", *tuned.metrics, "differs in")
    front = {row.name for row in tuned.front}
    done = {row.recipe: row for row in reversed(tuned.rows) if row.values}.values()
    ranked = sorted(done, key=lambda row: (row.name not in front, *row.values.values()))
    for row in ranked[:most] + [row for row in ranked[most:] if row.name == "base"]:
        values = [f"{value:,.0f}" if value > 1e5 else f"{value:.4g}" for value in row.values.values()]
        table.add_row(row.name, "*" if row.name in front else "", *values, _differs(row.overrides))
    table.columns[-1].justify = "left"
    for state in ("pruned", "fail"):
        if ended := [row for row in tuned.rows if row.state == state]:
            table.add_row(f"{len(ended)} {state}", "", *[""] * len(tuned.metrics), ended[-1].reason)
    return table


def _differs(overrides: Mapping[str, Any]) -> str:
    def words(key: str, value: Any) -> str:
        if isinstance(value, Mapping) and "name" in value:
            options = ", ".join(words(name, option) for name, option in value.items() if name != "name")
            return f"{key} {value['name']}" + (f" ({options})" if options else "")
        return f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"

    return ", ".join(words(key, value) for key, value in overrides.items())


def _from_report(report: Mapping[str, Any], model: str, output: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The rows a report can fill, dense and pruned."""

    def rows(which: str, folder: Path) -> dict[str, float]:
        found: dict[str, float] = {
            "parameters": report[which]["parameters"],
            "block parameters": report[which]["block_parameters"],
            "perplexity": report["losses"][which]["perplexity"],
        }
        if (weights := report.get("weights")) is not None:
            found["not zero in linear maps"] = weights["in_linear_maps" if which == "dense" else "not_zero"]
        if (pace := report.get("latency")) is not None:
            found["milliseconds"] = pace["milliseconds"][which]
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return {**found, "size on disk": stored} if stored else found

    return rows("dense", Path(model).expanduser()), rows("pruned", output)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title, *(columns or ("",)), box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns[1:] if columns else ():
        column.justify = "right"
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    # a pipe has no width: a label cut in two is of no use to a program
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:  # a plug-in inside a plug-in has its own row
        return str(value["name"])
    return str(value)


# -- plumbing -----------------------------------------------------------------------------------------


def _ended(sentence: str, code: int) -> typer.Exit:
    typer.echo(f"error: {sentence}" if code != INTERRUPTED else sentence, err=True)
    return typer.Exit(code)


def _model(argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None and argument != option:
        raise WrongInput(f"two models were given, {argument!r} and --model {option!r}; give one")
    return argument if argument is not None else option


FLAGS: Mapping[str, str] = {  # of `prune` -> recipe key
    **{key: key for key in ("sparsity", "target", "pruner", "allocator", "objective", "carry", "structure")},
    **{key: key for key in ("seed", "engine", "device", "dtype", "memory")},
    **{key: f"data.{key}" for key in ("dataset", "calibration_tokens", "search_tokens", "seqlen")},
    "finisher": "finishers",
}


def _chosen(options: Mapping[str, Any], command: str) -> tuple[Recipe, str, bool]:
    """(the recipe that options of `prune` ask for, its model, whether it is the first of a family to be made)."""
    from prunekit.recipe.overrides import parsed
    from prunekit.recipe.schema import Recipe

    given = {FLAGS[name]: value for name, value in options.items() if name in FLAGS}
    given |= {"model": _model(options["model"], options["model_option"]), "data.dataset": _several(options["dataset"])}
    given = {key: value for key, value in given.items() if value not in (None, [])}
    base, overrides = Recipe.load(options["recipe"]), given | dict(map(parsed, options["set_"] or []))
    several = base.spread(overrides)
    chosen = several or base.with_overrides(overrides)
    if chosen.model is None:
        raise WrongInput(f"no model was given; name a folder or a hub id: prunekit {command} MODEL --output DIR")
    return chosen.checked(), chosen.model, several is not None


def _several(names: Sequence[str] | None) -> list[str] | None:
    """Data sets, also those given by comma; a file may have commas in its name."""
    if not names:
        return None
    return [name for text in names for name in ([text] if Path(text).is_file() else text.split(","))]


def _kinds() -> tuple[Registry[Any], ...]:
    from prunekit.plugins.registry import KINDS

    return KINDS


def _described(entry: Any) -> dict[str, Any]:
    row = {"kind": entry.kind, "name": entry.name, "owner": entry.owner}
    try:
        options = [{"name": o.name, "type": o.type, "default": o.default} for o in entry.options]
        return {**row, "summary": entry.summary, "options": options}
    except ImportError as error:  # an extra that is not installed hides one plug-in, not the list
        return {**row, "summary": str(error), "options": []}


def _passes(registry: Registry[Any], spec: Mapping[str, Any]) -> int:
    """Exit code of the suite, run on a module of three lines as an author would write it."""
    import tempfile

    import pytest

    module = (
        "import pytest\n"
        'pytest.register_assert_rewrite("prunekit.testing")\n'
        "from prunekit import registry, testing\n\n\n"
        f"class Test{registry.kind.capitalize()}(testing.{SUITES[registry.kind]}):\n"
        f"    plugin = next(r for r in registry.KINDS if r.kind == {registry.kind!r}).build({dict(spec)!r})\n"
    )
    with tempfile.TemporaryDirectory(prefix="prunekit-check-") as folder:
        file = Path(folder) / "test_plugin.py"
        file.write_text(module)
        options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={folder}"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # this process has imported much already
        return int(pytest.main([str(file), *options]))


def _calm() -> None:
    """Progress is ours to show."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    disable_progress_bars()
    hub.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
