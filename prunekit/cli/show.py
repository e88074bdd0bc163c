"""`prunekit show`: what a result, a family, a study or a comparison is, in the terminal; its search for other tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from prunekit.cli.options import switch
from prunekit.cli.tables import comparison, members, print_table, recipes, rows_of_report
from prunekit.errors import WrongInput, without_secrets
from prunekit.system.files import read_json

STORAGE = "Optuna storage to write the run's search to, e.g. sqlite:///runs.db, for optuna-dashboard."


def show(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A result, family, study or comparison.", show_default=False)
    ],
    *,
    storage: Annotated[str | None, switch(STORAGE, None, "--storage")] = None,
    study_name: Annotated[
        str | None, switch("Name of the new study; otherwise the folder's.", None, "--study-name")
    ] = None,
) -> None:
    """Show what a folder holds, in the terminal; with --storage, write its search as an Optuna study."""
    from prunekit.report.ledger import read_records
    from prunekit.report.page.parts import kind_of, readable
    from prunekit.report.storage import write_study

    kind = kind_of(folder)
    if study_name is not None and storage is None:
        raise WrongInput("--study-name is of a study that is written; give --storage as well")
    if storage is not None and kind == "study":
        raise WrongInput(f"{folder} is an Optuna study already: optuna-dashboard {folder / 'study.log'}")
    if storage is not None and kind != "result":
        raise WrongInput(f"{folder} is a {kind}, and a search is of one result; give the folder of a result")
    with readable(folder):
        SHOWN[kind](folder)
    if storage is not None:
        name = study_name or folder.resolve().name
        with readable(folder):
            count = write_study(read_records(folder / "ledger.jsonl"), storage, name)
        typer.echo(f"{count:,} questions in study {name!r}: optuna-dashboard {without_secrets(storage)}")


def _result(folder: Path) -> None:
    report = read_json(folder / "report.json")
    print_table(comparison(str(folder), *rows_of_report(report, str(report["model"]), folder)))


def _family(folder: Path) -> None:
    print_table(members(str(folder), read_json(folder / "pareto.json")))


def _study(folder: Path) -> None:
    document = read_json(folder / "trials.json")
    print_table(recipes(document["rows"], document["metrics"], set(document["front"])))


def _comparison(folder: Path) -> None:
    from prunekit.report.page.comparison import read_comparison

    typer.echo(read_comparison(folder).table())


SHOWN: Mapping[str, Callable[[Path], None]] = {
    "result": _result, "family": _family, "study": _study, "comparison": _comparison,
}  # fmt: skip
