"""`prunekit export`: a model in further formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli.completion import one_of, plugins, several_of
from prunekit.cli.options import METHOD, RUN, JsonLines, Quiet, Trust, option, split_names, switch
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import format_bytes, print_table, verdict_table
from prunekit.errors import WrongInput

FOLDER = "Folder of a result, or of a model of a family that prunekit knows."
FORMAT = "Name of an exporter. Repeatable, or several by comma."
DTYPE = (
    "Number format of the weights. hf and vllm: float32, bfloat16, float16, by default that of the model; onnx: "
    "float32 (default), float16; gguf: f16 (default), f32, bf16, q8_0, and others that prunekit list gguf tells."
)
OUTPUT = "New folder for it; otherwise formats that have a place of their own lie beside the model."
SET = "Option of an exporter, as NAME.option=value. Repeatable."
VERIFY = (
    "Comparison with the network that was judged, or with the model itself where none was, in the engine that runs the "
    "format, before it is kept."
)
MEMORY = "Memory to use, e.g. 8GiB; a model that needs more is read block by block."


def export(
    folder: Annotated[str, typer.Argument(metavar="DIR", help=FOLDER, show_default=False)],
    *,
    format_: Annotated[
        list[str] | None, option(FORMAT, None, "--format", autocompletion=several_of(plugins("exporter")))
    ] = None,
    dtype: Annotated[
        str | None,
        option(DTYPE, autocompletion=one_of(lambda: ("float32", "bfloat16", "float16", "f32", "bf16", "f16", "q8_0"))),
    ] = None,
    output: Annotated[Path | None, switch(OUTPUT, None, "--output", "-o")] = None,
    set_: Annotated[list[str] | None, option(SET, METHOD, "--set", metavar="NAME.OPTION=VALUE")] = None,
    trust_remote_code: Trust = False,
    verify: Annotated[bool, switch(VERIFY, RUN)] = True,
    memory: Annotated[str, option(MEMORY, RUN, metavar="SIZE")] = "auto",
    overwrite: Annotated[bool, switch("Replacement of an earlier result in --output.", RUN, "--overwrite")] = False,
    quiet: Quiet = False,
    json_lines: JsonLines = None,
) -> dict[str, Any]:
    """Write a model in another format, e.g. prunekit export DIR --format NAME. It is verified before it is kept."""
    from prunekit.models.places import located
    from prunekit.plugins.registry import EXPORTERS
    from prunekit.recipe.overrides import parsed

    if (names := split_names(format_)) is None:
        raise WrongInput(f"no --format was given; there are {', '.join(EXPORTERS)}")
    for name in names:
        _ = EXPORTERS[name]
    located(folder)
    from prunekit.export.formats import build_formats, check_installed

    exporters = build_formats(names, dtype, dict(map(parsed, set_ or [])))
    for name, exporter in zip(names, exporters, strict=True):
        check_installed(exporter, f"format {name!r}")
    from prunekit.run.export import export_model
    from prunekit.system.progress import progress_for

    quiet_libraries()
    made = export_model(
        folder, exporters, output, verify=verify, overwrite=overwrite, memory=memory,
        trust_remote_code=trust_remote_code, progress=progress_for(quiet),
    )  # fmt: skip
    if made.verdict is not None:
        print_table(verdict_table(made.verdict))
    for file in made.files:
        typer.echo(f"{file}  {format_bytes(file.stat().st_size)}")
    for where in made.delivered:
        typer.echo(f"uploaded to {where}")
    return {"files": list(made.files), "delivered": list(made.delivered)}
