"""The sections about a study of `tune`: what was tried, what each choice is worth, the best recipe."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.report.markup import paragraph, table
from prunekit.report.page import charts
from prunekit.report.page.part import Part
from prunekit.report.words import chosen, differs, finite, number
from prunekit.system.files import read_json

TRIALS = "trials.json"  # all rows of a study, for who has no Optuna
MOST = 12  # charts of choices


def parts_of_study(folder: Path, name: str) -> list[Part]:
    """Make the sections.

    Args:
        folder: of the study.
        name: begins all anchors.
    """
    document = read_json(folder / TRIALS)
    rows, metrics, front = document["rows"], list(document["metrics"]), set(document["front"])
    done = [row for row in rows if row["values"]]
    first = metrics[0]
    tried = len(rows) - 1  # without the base
    title = f"{Path(str(document['model'])).name}, {document['sparsity']:.0%}: {tried} recipes tried"
    drawn = [charts.trials(f"{name}-trials", _in_order(done, first), first)] if done else []
    points = [
        {"name": row["name"], "front": row["name"] in front}
        | {metric: finite(row["values"][metric]) for metric in metrics}
        for row in done
    ]
    for i, metric in enumerate(metrics[1:] if done else ()):
        drawn.append(charts.front(f"{name}-front-{i}", points, metric, metrics[0]))
    intro = paragraph(
        "Judged on the search text; the test text was not looked at. "
        + (f"* marks the front of {', '.join(metrics)}." if len(metrics) > 1 else "* marks the best.")
    )
    parts = [Part(title, title, name, intro, drawn, listed_recipes(rows, metrics, front))]
    if choices := _choices(done, first):
        parts.append(
            Part(title, "What each choice is worth", f"{name}-choices", "",
                 [charts.choice(f"{name}-choice-{i}", key, found, first)
                  for i, (key, found) in enumerate(list(choices.items())[:MOST])])
        )  # fmt: skip
    best = folder / "best.yaml"
    if best.is_file():
        text = best.read_text("utf-8", errors="replace")
        shown = f"<pre tabindex='0' aria-label='best recipe'>{html.escape(text)}</pre>"
        parts.append(Part(title, "The best recipe", f"{name}-best", shown))
    return parts


def listed_recipes(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], front: set[str]) -> str:
    """Make the table of all recipes, those of the front first.

    Args:
        rows: as in trials.json.
        metrics: what was minimised.
        front: names of the best rows.
    """
    return table(
        "Recipes",
        ("recipe", "", *metrics, "differs from the base in", "ended", "why"),
        [
            (row["name"], "*" if row["name"] in front else "",
             *(number(row["values"][m], 0 if row["values"][m] > 1e5 else 4) if row["values"] else "" for m in metrics),
             differs(row["overrides"]), row["state"], row["reason"])
            for row in sorted(rows, key=lambda row: _rank(row, front, metrics))
        ],
        sortable=True, filtered=True,
    )  # fmt: skip


def _rank(row: Mapping[str, Any], front: set[str], metrics: Sequence[str]) -> tuple[bool, bool, list[float]]:
    return not row["values"], row["name"] not in front, [float(row["values"][m]) for m in metrics if row["values"]]


def _in_order(done: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Every recipe with the lowest value so far; the base is number 0."""
    found, lowest = list[dict[str, Any]](), float("inf")
    for row in done:
        value = float(row["values"][metric])
        lowest = min(lowest, value)
        place = 0 if row["name"] == "base" else int(row["name"]) + 1
        found.append({"trial": place, "name": row["name"], "value": value, "lowest": lowest})
    return found


def _choices(done: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[dict[str, Any]]]:
    """By key of a recipe, the values that were tried and what came of them; those that had one alone are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in done:
        for key, value in row["overrides"].items():
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            found.setdefault(key, []).append(
                {
                    "choice": value if plain else chosen(value),
                    "value": float(row["values"][metric]),
                    "name": row["name"],
                }
            )
    return {key: some for key, some in found.items() if len({str(each["choice"]) for each in some}) > 1}
