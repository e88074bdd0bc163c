"""Measured time against perplexity, of the cells of a comparison that were timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from prunekit.report.comparison import DENSE, PACED, PACED_TEXT, PACES, Comparison, Entry, Row
from prunekit.report.markup import paragraph, table
from prunekit.report.page import charts
from prunekit.report.page.part import Part
from prunekit.report.words import finite, number

HEADS = ("cell", "perplexity", *PACED, "prefill, tokens/s", "decode, tokens/s")


def parts_of_paces(found: Comparison, model: str, title: str, anchor: str) -> list[Part]:
    """Make the section on one model; none where nothing of it was timed.

    Args:
        found: the comparison.
        model: of which cells are shown.
        title: of the page.
        anchor: of the section.
    """
    places = [sparsity for each, sparsity in found.places if each == model]
    cells = [
        (f"{entry.standing.name}, {sparsity:.0%}" if len(places) > 1 else entry.standing.name, entry)
        for sparsity in places for entry in found.leaderboard(model, sparsity)
    ]  # fmt: skip
    drawn, dense = list[charts.Chart](), finite(found.dense(model).perplexity)
    for what in PACES:
        points = [
            {"name": name, "perplexity": finite(entry.perplexity), "time": 1 / ratio.median, "low": 1 / ratio.high,
             "high": 1 / ratio.low, "said": f"{ratio}" + " × as fast" * ratio.clear}
            for name, entry in cells if (ratio := entry.pace(what)) is not None
        ]  # fmt: skip
        if not points:
            return []
        whole = {"name": DENSE, "perplexity": dense, "time": 1.0, "low": 1.0, "high": 1.0, "said": "as it is"}
        words = f"{what} time as a share of dense"  # as wide as a phone
        rows, beaten = beyond_noise([*points, whole]), "a better one takes no longer"
        drawn.append(charts.front(f"{anchor}-{what}", rows, "time", title=words, share=True, beaten=beaten, log=True))
    timed = sum(entry.pace(PACES[0]) is not None for _, entry in cells)
    text = (
        f"{timed} of {len(cells)} cells were timed. Lines through points are 95 % intervals of time. A cell is on the "
        "front where all of lower perplexity, the dense model among them, take longer by more than noise: their "
        "intervals are apart. Perplexities are taken as they are; which of them are ties, the leaderboard says."
    )
    listed = table(
        "Measured speed", HEADS, _lines(found, model, cells), sortable=True, filtered=True, first=charts.SHOWN
    )
    about = paragraph(PACED_TEXT + " " + " ".join(found.timing(model, sparsity) for sparsity in places))
    heading = f"{Path(model).name}: measured time against perplexity"
    return [Part(title, heading, anchor, paragraph(text), drawn, listed + about)]


def _lines(found: Comparison, model: str, cells: Sequence[tuple[str, Entry]]) -> list[tuple[str, ...]]:
    """What `HEADS` says of the dense model and of every cell, tokens per second as means over seeds."""

    def rates(rows: Sequence[Row]) -> tuple[str, str]:
        read = [row.prefill_tokens_per_second for row in rows if row.prefill_tokens_per_second is not None]
        made = [row.decode_tokens_per_second for row in rows if row.decode_tokens_per_second is not None]
        return (f"{fmean(read):,.0f}" if read else "", f"{fmean(made):,.1f}" if made else "")

    dense = found.dense(model)
    first = (DENSE, number(dense.perplexity), "", "", *rates([dense]))
    return [first, *((name, number(each.perplexity), *each.paces, *rates(each.rows)) for name, each in cells)]


def beyond_noise(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say of every point whether it is on the front of perplexity and time, as far as noise lets it be told.

    It is not where another has a lower perplexity and is not slower beyond noise, or as low a one and is faster beyond
    it.

    Args:
        points: each with its `perplexity` and the interval of its time from `low` to `high`.
    """

    def beats(other: dict[str, Any], each: dict[str, Any]) -> bool:
        if other["perplexity"] is None or other["perplexity"] > each["perplexity"]:
            return False
        if other["perplexity"] == each["perplexity"]:
            return bool(other["high"] < each["low"])
        return bool(other["low"] <= each["high"])

    return [
        each | {"front": each["perplexity"] is not None and not any(beats(other, each) for other in points)}
        for each in points
    ]
