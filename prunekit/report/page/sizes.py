"""Size and time against perplexity, of several results that one page is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.report.markup import paragraph, table
from prunekit.report.page import charts
from prunekit.report.page.part import Part
from prunekit.report.words import finite, number
from prunekit.system.files import read_json


def milliseconds(report: Mapping[str, Any]) -> tuple[float, float] | None:
    """What the dense and the pruned model took, where the budget was time; `report` is the content of report.json."""
    found = report.get(report.get("budget", {}).get("metric", ""))
    times = found.get("milliseconds") if isinstance(found, Mapping) else None
    return None if times is None else (float(times["dense"]), float(times["pruned"]))


def parts_of_several(folders: Sequence[Path]) -> list[Part]:
    """Make a section for every model that several results are of, judged on the same text.

    Args:
        folders: of results.
    """
    places: dict[tuple[str, str], list[tuple[Path, Mapping[str, Any]]]] = {}
    for folder in folders:
        report = read_json(folder / "report.json")
        places.setdefault((str(report["model"]), report["losses"]["dense"]["label"]), []).append((folder, report))
    several = {place: found for place, found in places.items() if len(found) > 1}
    return [_part(i, *place, found) for i, (place, found) in enumerate(several.items())]


def marked(points: Sequence[dict[str, Any]], size: str, loss: str = "perplexity") -> list[dict[str, Any]]:
    """Say of every point whether it is on the front: no other is as good in both and better in one."""
    known = [(each[size], each[loss]) for each in points if each[loss] is not None]
    return [
        each | {"front": each[loss] is not None and not any(
            other != (each[size], each[loss]) and other[0] <= each[size] and other[1] <= each[loss] for other in known
        )}
        for each in points
    ]  # fmt: skip


def _part(i: int, model: str, label: str, found: Sequence[tuple[Path, Mapping[str, Any]]]) -> Part:
    title = f"{Path(model).name}, {len(found)} results"
    names = [folder.name for folder, _ in found]
    if len(set(names)) < len(names):
        names = [str(folder) for folder, _ in found]
    points, times = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, (_, report) in zip(names, found, strict=True):
        point = {"name": name, "perplexity": finite(report["losses"]["pruned"]["perplexity"])}
        points.append(point | {"parameters": report["pruned"]["parameters"]})
        if (pair := milliseconds(report)) is not None:
            times.append(point | {"time": pair[1] / pair[0]})
    dense = {"name": "dense", "perplexity": finite(found[0][1]["losses"]["dense"]["perplexity"])}
    points.append(dense | {"parameters": found[0][1]["dense"]["parameters"]})
    drawn = [charts.front(f"several-{i}-size", marked(points, "parameters"), "parameters")]
    if len(times) > 1:
        times = marked([*times, dense | {"time": 1.0}], "time")
        drawn.append(charts.front(f"several-{i}-time", times, "time", title=TIME, share=True))
    share = {each["name"]: f"{each['time']:.1%}" for each in times}
    listed = table(
        "Results", ("result", "parameters", "perplexity", "of the dense model's time"),
        [(each["name"], f"{each['parameters']:,}", number(each["perplexity"]), share.get(each["name"], ""))
         for each in points],
        sortable=True,
    )  # fmt: skip
    text = paragraph(f"Perplexity is of {label}. What is on the front is beaten by no other in both.")
    return Part(title, title, f"several-{i}", text, drawn, listed)


TIME = "time, of the dense model's, as measured"
