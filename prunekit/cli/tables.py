"""Tables that commands print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from prunekit.run.verify import Check, Verdict


def format_bytes(n: float) -> str:
    """Format bytes: 1.5 MB."""
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
    "size on disk": format_bytes,
    "milliseconds": "{:,.4g}".format,
}


def comparison(
    title: str, dense: Mapping[str, float], pruned: Mapping[str, float], more: Sequence[Sequence[str]] = ()
) -> Table:
    """Make a table of dense against pruned.

    Args:
        title: of the first column.
        dense: values by the keys of `ROWS`; what was not measured is left out.
        pruned: the same of the pruned model.
        more: further rows, as they are printed.
    """
    table = new_table(title, "dense", "pruned", "ratio")
    for row, text in ROWS.items():
        if row in dense and row in pruned:
            ratio = f"{pruned[row] / dense[row]:.3f}" if dense[row] else ""
            table.add_row(row, text(dense[row]), text(pruned[row]), ratio)
    for cells in more:
        table.add_row(*cells)
    return table


def members(title: str, document: Mapping[str, Any]) -> Table:
    """Make a table of a family, by ascending sparsity; * is on the Pareto front.

    Args:
        title: of the first column.
        document: the content of pareto.json.
    """
    table = new_table(title, "", "sparsity", "parameters", "perplexity", "token-forwards", "seconds")
    dense = document["dense"]
    table.add_row("dense", "", "", f"{dense['parameters']:,}", f"{dense['perplexity']:,.2f}")
    for row in document["members"]:
        numbers = f"{row['parameters']:,}", f"{row['perplexity']:,.2f}", f"{row['token_forwards']:,}"
        table.add_row(
            row["folder"], "*" if row["front"] else "", f"{row['realised']:.4f}", *numbers, f"{row['seconds']:,.0f}"
        )
    table.add_row("in all", *[""] * 4, f"{document['token_forwards']:,}", f"{document['seconds']:,.0f}")
    return table


def recipes(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], front: Collection[str], most: int = 12) -> Table:
    """Make a table of a study: the front, then by the first metric, then how many trials failed.

    Args:
        rows: as in trials.json.
        metrics: what was minimised.
        front: names of the best rows, marked *.
        most: number of recipes; the base recipe is among them or follows.
    """
    from prunekit.report.words import differs

    table = new_table("recipe", "", *metrics, "differs in")
    done = list({row["recipe"]: row for row in reversed(rows) if row["values"]}.values())[::-1]  # a recipe once
    ranked = sorted(done, key=lambda row: (row["name"] not in front, *row["values"].values()))
    for row in ranked[:most] + [row for row in ranked[most:] if row["name"] == "base"]:
        values = [f"{value:,.0f}" if value > 1e5 else f"{value:.4g}" for value in row["values"].values()]
        table.add_row(row["name"], "*" if row["name"] in front else "", *values, differs(row["overrides"]))
    table.columns[-1].justify = "left"
    for state in ("pruned", "fail"):
        if ended := [row for row in rows if row["state"] == state]:
            table.add_row(f"{len(ended)} {state}", "", *[""] * len(metrics), ended[-1]["reason"])
    return table


def rows_of_report(report: Mapping[str, Any], model: str, output: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Read the values of `comparison` out of a report.

    Args:
        report: the content of report.json.
        model: folder or hub id of the dense model.
        output: folder of the result.

    Returns:
        (dense, pruned), values by the keys of `ROWS`.
    """
    from prunekit.report.document import promise

    def rows(which: str, folder: Path) -> dict[str, float]:
        found: dict[str, float] = {
            "parameters": report[which]["parameters"],
            "block parameters": report[which]["block_parameters"],
            "perplexity": report["losses"][which]["perplexity"],
        }
        if (weights := report.get("weights")) is not None:
            found["not zero in linear maps"] = weights["in_linear_maps" if which == "dense" else "not_zero"]
        if (ms := (promise(report) or {}).get("milliseconds")) is not None:
            found["milliseconds"] = ms[which]
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return {**found, "size on disk": stored} if stored else found

    return rows("dense", Path(model).expanduser()), rows("pruned", output)


def verdict_table(verdict: Verdict) -> Table:
    """Make a table of what was compared; a row that differs says so."""
    table = new_table(verdict.folder, "", "expected", "found")
    words = {True: "agrees", False: "DIFFERS", None: ""}
    sections = [
        ("files", verdict.rows),
        *((f"{check.format} in {check.engine}", check.rows) for check in verdict.checks),
    ]
    for title, rows in sections:
        for row in rows:
            table.add_row(f"{title}: {row.what}", words[row.agrees], row.judged, row.found)
    table.caption = f"expected: of {verdict.against}"
    table.caption_justify = "left"
    for column in table.columns[1:]:
        column.justify = "left"
    return table


def speed_table(check: Check) -> Table:
    """Make a table of two models in one engine."""
    table = new_table(check.engine, "dense", "pruned", "ratio")
    for cells in check.speed:
        table.add_row(*cells)
    return table


def new_table(title: str, *columns: str) -> Table:
    """Make an empty table: labels to the left, numbers to the right."""
    from rich.table import Table

    table = Table(title, *(columns or ("",)), box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns[1:] if columns else ():
        column.justify = "right"
    return table


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal is."""
    from rich.console import Console

    # a pipe has no width: a label cut in two is of no use to a program; names of files are no markup
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)
