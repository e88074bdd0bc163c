"""The section about a family: its members, and size against perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.report.markup import table
from prunekit.report.page import charts
from prunekit.report.page.part import Part
from prunekit.report.words import finite, number
from prunekit.system.files import read_json


def parts_of_family(folder: Path, name: str) -> list[Part]:
    document = read_json(folder / "pareto.json")
    rows, dense = document["members"], document["dense"]
    model = Path(str(document["model"])).name
    title = f"{model}, a family of {len(rows)}"
    points = [
        {"name": str(row["folder"]), "parameters": row["parameters"], "perplexity": finite(row["perplexity"]),
         "front": bool(row["front"])}
        for row in rows
    ]  # fmt: skip
    points.append(
        {"name": "dense", "parameters": dense["parameters"], "perplexity": dense["perplexity"], "front": True}
    )
    drawn = [charts.front(f"{name}-front", points, "parameters")]
    return [Part(title, title, name, listed_members(document), drawn)]


def listed_members(document: Mapping[str, Any]) -> str:
    """Make the table of members; `document` is the content of pareto.json."""
    return table(
        "Members",
        ("folder", "sparsity", "parameters", "perplexity", "on the front"),
        [
            (row["folder"], f"{row['sparsity']:.0%}", f"{row['parameters']:,}", number(row["perplexity"]),
             "yes" if row["front"] else "no")
            for row in document["members"]
        ],
        sortable=True,
    )  # fmt: skip
