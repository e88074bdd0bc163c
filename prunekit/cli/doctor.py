"""`prunekit doctor`: what is on this machine, what is missing, and what is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from prunekit.cli.errors import BROKEN
from prunekit.cli.options import Json

if TYPE_CHECKING:
    from prunekit.run.doctor import Findings


def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, devices, memory, disk, engines, extras, plug-ins. Exit code 1: one is broken."""
    from prunekit.run.doctor import examine

    found = examine(Path())
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        rows = list(_rows(found))
        width = max(len(what) for what, _ in rows)
        for what, said in rows:
            typer.echo(f"{what:{width}}  {said}".rstrip())
    if not found.sound:
        raise typer.Exit(BROKEN)


def _rows(found: Findings) -> Iterator[tuple[str, str]]:
    from prunekit.system.sizes import amount

    yield "python", f"{found.python['version']}, {found.python['executable']}, {found.python['system']}"
    for name, version in found.packages.items():
        count = f", {found.plugins[name]} plug-ins" if name in found.plugins else ""
        yield name, f"{version or 'not installed'}{count}"
    yield "", ""
    if found.cpu:
        cpu = found.cpu
        units = ", ".join(cpu["matrix_units"]) or "none known"
        yield "processor", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores; units: {units}"
        ratio = f"a product in bfloat16 is {cpu['bfloat16_times_as_fast']} times as fast as in float32"
        yield "dtype auto", f"{cpu['dtype_auto']} of a bfloat16 checkpoint: {ratio}"
        omp = found.threads["OMP_NUM_THREADS"]
        yield "threads", f"{found.threads['torch']}, OMP_NUM_THREADS {'not set' if omp is None else omp}"
        yield "memory", f"{amount(found.memory['free'])} free of {amount(found.memory['total'])}"
    for each in found.devices:
        memory = f"{amount(each['free'])} free of {amount(each['memory'])}"
        yield each["device"], f"{each['name']}, capability {each['capability']}, {memory}"
    if found.cpu and not found.devices:
        yield "cuda", "no device"
    for each in found.disk:
        yield f"disk, {each['what']}", f"{amount(each['free'])} free of {amount(each['total'])}, {each['path']}"
    yield "", ""
    for engine in found.engines:
        how = f"not installed: {engine.install}" if engine.install else "none on the path"
        formats = f" (formats {', '.join(engine.formats)})" if engine.formats else ""
        yield f"engine {engine.name}", f"{engine.found or how}{formats}"
    yield "", ""
    for extra in found.extras:
        lacks = f"lacks {'; '.join(extra.missing)}: {extra.install}"
        yield f"extra {extra.name}", lacks if extra.missing else "installed"
    for each in found.needs:
        yield f"{each.kind} {each.name}", each.error
    if not found.sound:
        yield "", ""
    for each in found.broken:
        yield "broken", each.error
    for problem in found.problems:
        yield "broken", problem
    if found.sound:
        yield "", ""
        yield "nothing is broken", ""
