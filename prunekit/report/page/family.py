"""The section about a family: its members, and size against perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.report.markup import table
from prunekit.report.page import charts
from prunekit.report.page.part import Part
from prunekit.report.page.sizes import TIME, marked
from prunekit.report.words import finite, number
from prunekit.system.files import read_json


def parts_of_family(folder: Path, name: str) -> list[Part]:
    document = read_json(folder / "pareto.json")
    rows, dense = document["members"], document["dense"]
    model = Path(str(document["model"])).name
    title = f"{model}, a family of {len(rows)}"
    points = [
        {"name": str(row["folder"]), "parameters": row["parameters"], "left": 1 - float(row["realised"]),
         "perplexity": finite(row["perplexity"])}
        for row in rows
    ]  # fmt: skip
    points.append({"name": "dense", "parameters": dense["parameters"], "left": 1.0, "perplexity": dense["perplexity"]})
    drawn = [charts.front(f"{name}-front", marked(points, "parameters"), "parameters")]
    if (metric := str(document["metric"])) != "parameters":  # the first picture is of what the budget counted
        words = TIME if metric == "latency" else f"{metric}, of the dense model's"
        drawn.insert(0, charts.front(f"{name}-spent", marked(points, "left"), "left", title=words, share=True))
    return [Part(title, title, name, listed_members(document), drawn)]


def listed_members(document: Mapping[str, Any]) -> str:
    """Make the table of members; `document` is the content of pareto.json."""
    return table(
        "Members",
        ("folder", "perplexity", "parameters", "sparsity", "removed", "on the front"),
        [
            (row["folder"], number(row["perplexity"]), f"{row['parameters']:,}", f"{row['sparsity']:.0%}",
             _removed(row), "yes" if row["front"] else "no")
            for row in document["members"]
        ],
        sortable=True,
    )  # fmt: skip


def _removed(row: Mapping[str, Any]) -> str:
    """What is gone of what the budget counts, measured where it is measured."""
    found = finite(row.get("realised"))
    return "" if found is None else f"{found:.2%}"
