"""The sections about a comparison: a leaderboard per model and sparsity, ranks, what has no result, the suite."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput
from prunekit.recipe.suite import Suite
from prunekit.report.comparison import (
    COMPLETE,
    DENSE,
    HEADS,
    OPTIMA,
    OPTIMA_TEXT,
    ROWS,
    SECONDS,
    WITHOUT,
    Comparison,
    Entry,
    Row,
    Rows,
)  # fmt: skip
from prunekit.report.markup import paragraph, table
from prunekit.report.page import charts
from prunekit.report.page.grid import drawn_grids
from prunekit.report.page.part import Part
from prunekit.report.statistics import Standing
from prunekit.report.words import finite, number
from prunekit.system.files import Damaged, read_state
from prunekit.system.progress import span

CARD = "run.json"
DIFFERENCES = (
    "Differences are logs of ratios of perplexities, paired by window, with 95 % intervals over windows and seeds. "
    "What is marked = is not separated from the best after Holm's correction. " + SECONDS
)
BETTER = 0.97  # of the perplexity of all that is faster: a cell that is named among many


def read_comparison(folder: Path) -> Comparison:
    """Read what was compared, and its rows so far.

    Raises:
        WrongInput: the folder does not say what was compared.
        Damaged: its rows were changed.
    """
    try:
        suite = Suite.of_mapping(read_state(folder / CARD)["identity"]["suite"])
    except (KeyError, TypeError, Damaged) as error:
        raise WrongInput(f"{folder / CARD} does not say what was compared; run the comparison again") from error
    return Comparison(suite, list(Rows(folder / ROWS)), folder)


def parts_of_comparison(folder: Path, name: str) -> list[Part]:
    """Make the sections.

    Args:
        folder: of the comparison.
        name: begins all anchors.
    """
    found = read_comparison(folder)
    models = list(dict.fromkeys(model for model, _ in found.places))
    cells = {row.cell for row in found.rows if row.cell != DENSE}
    title = f"{len(cells)} methods on {', '.join(Path(model).name for model in models) or 'no model yet'}"
    parts = list[Part]()
    for i, (model, sparsity) in enumerate(found.places):
        parts += _parts_of_place(found, model, sparsity, title, f"{name}-{i}")
    if (ranked := found.ranks()) is not None:
        text = paragraph(
            f"Friedman's p that all are alike: {ranked.p:.3g}, over {ranked.blocks} blocks of model, sparsity and "
            f"seed. Ranks that differ by less than {ranked.critical:.2f} are not separated (Nemenyi, 95 %)."
        )
        drawn = [charts.ranks(f"{name}-ranks-chart", ranked.mean, ranked.critical)]
        parts.append(Part(title, "Mean ranks", f"{name}-ranks", text, drawn))
    if found.without:
        missing = table("Cells without a result", WITHOUT, found.missing, first=charts.SHOWN)
        parts.append(Part(title, "Without a result", f"{name}-without", missing))
    spent = sum(row.wall for row in found.rows)
    done = sum(row.state == COMPLETE for row in found.rows)
    text = json.dumps(found.suite.model_dump(mode="json"), indent=2)
    versions = table("Versions", ("package", "version"), list(found.as_dict()["versions"].items()))
    about = f"{paragraph(f'{done} rows in {span(spent)}.')}{versions}"
    about += f"<pre tabindex='0' aria-label='suite'>{html.escape(text)}</pre>"
    parts.append(Part(title, "Suite and environment", f"{name}-suite", about))
    return parts


def _parts_of_place(found: Comparison, model: str, sparsity: float, title: str, anchor: str) -> list[Part]:
    """What is said of the cells on one model at one sparsity.

    Pictures come before a table that is long, and first of all that of the grid, where there is one: it shows every
    cell at once.
    """
    heading = f"{Path(model).name}, {sparsity:.0%} removed"
    board = found.leaderboard(model, sparsity)
    pictures, numbers = drawn_grids(f"{anchor}-grid", found.suite, board)
    listed = table(
        "Leaderboard", HEADS, [each.cells for each in board], sortable=True, filtered=True, first=charts.SHOWN
    )
    drawn, intro = _pictures(found, model, sparsity, anchor), paragraph(_said(found, model, board))
    if pictures:
        parts = [
            Part(title, heading, anchor, intro, pictures, numbers),
            Part(title, f"{heading}: leaderboard", f"{anchor}-board", paragraph(DIFFERENCES), drawn, listed),
        ]
    elif len(board) > charts.SHOWN:
        parts = [Part(title, heading, anchor, intro + paragraph(DIFFERENCES), drawn, listed)]
    else:
        parts = [Part(title, heading, anchor, intro + paragraph(DIFFERENCES) + listed, drawn)]
    if limited := found.limited(model, sparsity):
        parts[-1] = replace(parts[-1], after=parts[-1].after + paragraph(limited))
    if near := found.optima(model, sparsity):
        listed = table("Distance to the exact optimum", OPTIMA, near, sortable=True, first=charts.SHOWN)
        heading = f"{heading}: distance to the exact optimum"
        parts.append(Part(title, heading, f"{anchor}-optimum", paragraph(OPTIMA_TEXT) + listed))
    return parts


def _said(found: Comparison, model: str, board: Sequence[Entry]) -> str:
    """The result in a few sentences."""
    dense, first, tied = found.dense(model), board[0], sum(each.standing.tied for each in board) - 1
    best = f"The best of {len(board)} is {first.standing.name}, {number(first.perplexity)}; "
    best += f"{tied} {'is' if tied == 1 else 'are'} not separated from it. " if tied else "no other is level with it. "
    return f"{best if math.isfinite(first.perplexity) else ''}Dense: {number(dense.perplexity)} ({dense.label})."


def _pictures(found: Comparison, model: str, sparsity: float, anchor: str) -> list[charts.Chart]:
    """Intervals, cost, and what searches have at any time; of many cells the first, that can be told apart."""
    board, rows = found.leaderboard(model, sparsity), found.of(model, sparsity)
    several, front = len(board) > charts.SHOWN, _front(found, [row for some in rows.values() for row in some])
    points = [
        {"cell": cell, "perplexity": row.perplexity, "seconds": max(found.seconds(row), 0.01), "seed": row.seed,
         "tokens": row.token_forwards, "named": row.key in front if several else row.seed == 0}
        for cell, some in rows.items() for row in some if row.perplexity is not None
    ]  # fmt: skip
    drawn = [
        charts.intervals(
            f"{anchor}-intervals", [_against(each.standing) for each in board[: charts.SHOWN]], len(board)
        ),
        charts.tradeoff(f"{anchor}-cost", points),
    ]
    searches = [each.rows[0] for each in board if any(tokens for tokens, _ in each.rows[0].trace)]
    if searches:
        traces = [
            {"cell": row.cell, "tokens": tokens, "loss": loss}
            for row in searches[: len(charts.MANY)] for tokens, loss in row.trace if tokens
        ]  # fmt: skip
        drawn.append(charts.anytime(f"{anchor}-anytime", traces, len(searches)))
    return drawn


def _front(found: Comparison, rows: Sequence[Row]) -> set[tuple[Any, ...]]:
    """The keys of rows that are better, by more than can be seen, than the last of these that took less time."""
    lowest, front = math.inf, set[tuple[Any, ...]]()
    for row in sorted(rows, key=found.seconds):
        if row.perplexity is not None and row.perplexity < BETTER * lowest:
            lowest = row.perplexity
            front.add(row.key)
    return front


def _against(each: Standing) -> dict[str, Any]:
    """A standing as a point with its interval against the reference, or against the best where there is none."""
    found = each.above_reference or each.above_best
    return {
        "cell": each.name, "mean": finite(found.mean), "low": finite(found.low), "high": finite(found.high),
        "tied": "not separated from the best" if each.tied else "worse than the best",
    }  # fmt: skip
