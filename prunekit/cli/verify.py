"""`prunekit verify`: a result in the engines that run it, beside what the judged network answered."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from prunekit.cli.errors import BROKEN
from prunekit.cli.options import MACHINE, Json, JsonLines, Quiet, Trust, option, split_names
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import print_table, speed_table, verdict_table

FOLDER = "Folder of a result, or of an export."
ENGINE = "Program that runs the files, repeatable or by comma; otherwise one that is installed for each of the formats."
AGAINST = "Dense model, timed in turns with this one: a folder, which holds the same formats."
ASK = "Question that every engine answers, by the chat template where there is one."


def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help=FOLDER, show_default=False)],
    *,
    engine: Annotated[list[str] | None, option(ENGINE, MACHINE)] = None,
    against: Annotated[str | None, option(AGAINST, MACHINE, metavar="MODEL")] = None,
    ask: Annotated[str | None, option(ASK, MACHINE, metavar="TEXT")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    quiet: Quiet = False,
    json_lines: JsonLines = None,
) -> dict[str, Any]:
    """Check that an export is the network that was judged. Exit code 0: it is, 1: it differs, 2: wrong input."""
    from prunekit.models.places import located

    located(folder)
    from prunekit.run.verify import verify_result
    from prunekit.system.progress import progress_for

    quiet_libraries()
    found = verify_result(
        folder, engines=split_names(engine), against=against, question=ask, trust_remote_code=trust_remote_code,
        progress=progress_for(quiet),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        print_table(verdict_table(found))
        for check in found.checks:
            if check.speed:
                print_table(speed_table(check))
    if not found.agrees:
        raise typer.Exit(BROKEN)
    return found.as_dict()
