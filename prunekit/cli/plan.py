"""`prunekit plan`: what a run will take."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import typer

from prunekit.cli.options import Json, choose_recipe
from prunekit.cli.prune import prune
from prunekit.cli.quiet import quiet_libraries
from prunekit.cli.tables import new_table, print_table


def plan(*, as_json: Json = False, **options: Any) -> None:
    """Memory, disk space and time that `prune` with the same options takes on this machine, stage by stage."""
    chosen, source, several = choose_recipe(options, "plan")
    from prunekit.run.session import foreseen
    from prunekit.system.progress import span
    from prunekit.system.sizes import amount

    quiet_libraries()
    output = options["output"] or Path("prunekit-output")  # a run without --output is refused; its disk is this one's
    found, rates, allotment = foreseen(chosen, source, output, several=several)
    if as_json:
        typer.echo(json.dumps(found.as_dict(rates), indent=2))
        found.check()
        return
    table = new_table(source, "memory", "disk", "time", "and")
    for stage in found.stages:
        seconds = stage.seconds(rates)
        took = "unknown" if seconds is None else span(seconds)
        if ends := stage.between(rates):
            took += f" ({span(ends[0])} to {span(ends[1])})"
        table.add_row(stage.name, amount(stage.memory + stage.shared), amount(stage.writes), took, stage.told)
    told = found.as_dict(rates)
    least = "" if told["seconds_complete"] else "at least "
    for own in told["members"]:
        table.add_row(f"{own['sparsity']} alone", "", amount(own["disk"]), least + span(own["seconds_known"]), "")
    table.add_row("in all", amount(told["memory"]), amount(told["disk"]), least + span(told["seconds_known"]), "")
    print_table(table)
    how = f"block by block, {amount(found.block)} each" if found.paged else "whole"
    if found.paged and len(found.devices) > 1:
        how += f", dealt out to {', '.join(map(str, found.devices))}"
    typer.echo(
        f"the model is opened {how}; there are {amount(max(0, found.limit))} of memory beside the process itself"
        f" and {amount(found.free_disk or 0)} of disk"
    )
    if allotment is not None:
        typer.echo(f"in {span(allotment.seconds)}: {allotment}")
    typer.echo(
        f"counted at {rates.flops / 1e9:,.0f} GFLOP/s of a block in {str(found.dtype)[6:]}, "
        f"{rates.doubles / 1e9:,.0f} in float64, {rates.write / 1e6:,.0f} MB/s written and {rates.read / 1e6:,.0f} read"
    )
    found.check()


def _take_options_of(of: Any, command: Any) -> None:
    """Let a command with `**options` have the parameters of another, as Typer reads them."""
    theirs = inspect.signature(of, eval_str=True).parameters.values()
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    command.__signature__ = inspect.Signature([*theirs, *own])
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}


_take_options_of(prune, plan)
