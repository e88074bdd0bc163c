"""The sections about a comparison: a leaderboard per model and sparsity, ranks, what has no result, the suite."""

from __future__ import annotations

import html
import json
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
    WITHOUT,
    Comparison,
    Rows,
)  # fmt: skip
from prunekit.report.markup import paragraph, table
from prunekit.report.page import charts
from prunekit.report.page.part import Part
from prunekit.report.statistics import Standing
from prunekit.report.words import finite, number
from prunekit.system.files import Damaged, read_state
from prunekit.system.progress import span

CARD = "run.json"


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
        heading = f"{Path(model).name}, {sparsity:.0%} removed"
        board, rows = found.leaderboard(model, sparsity), found.of(model, sparsity)
        anchor = f"{name}-{i}"
        dense = found.dense(model)
        intro = paragraph(
            f"Dense: {number(dense.perplexity)} ({dense.label}). Differences are logs of ratios of perplexities, "
            "paired by window, with 95 % intervals over windows and seeds. What is marked = is not separated from the "
            "best after Holm's correction."
        )
        listed = table("Leaderboard", HEADS, [each.cells for each in board], sortable=True, filtered=True)
        drawn = [
            charts.intervals(f"{anchor}-intervals", [_against(each.standing) for each in board]),
            charts.tradeoff(f"{anchor}-cost", [
                {"cell": cell, "perplexity": row.perplexity, "seconds": max(row.seconds, 0.01), "seed": row.seed,
                 "tokens": row.token_forwards}
                for cell, some in rows.items() for row in some if row.perplexity is not None
            ]),
        ]  # fmt: skip
        traces = [
            {"cell": cell, "tokens": tokens, "loss": loss}
            for cell, some in rows.items() for tokens, loss in some[0].trace if tokens
        ]  # fmt: skip
        if traces:
            drawn.append(charts.anytime(f"{anchor}-anytime", traces))
        parts.append(Part(title, heading, anchor, intro + listed, drawn))
        if near := found.optima(model, sparsity):
            exact = paragraph(OPTIMA_TEXT) + table("Distance to the exact optimum", OPTIMA, near, sortable=True)
            parts.append(Part(title, f"{heading}: distance to the exact optimum", f"{anchor}-optimum", exact))
    if (ranked := found.ranks()) is not None:
        text = paragraph(
            f"Friedman's p that all are alike: {ranked.p:.3g}, over {ranked.blocks} blocks of model, sparsity and "
            f"seed. Ranks that differ by less than {ranked.critical:.2f} are not separated (Nemenyi, 95 %)."
        )
        drawn = [charts.ranks(f"{name}-ranks-chart", ranked.mean, ranked.critical)]
        parts.append(Part(title, "Mean ranks", f"{name}-ranks", text, drawn))
    if found.without:
        missing = table("Cells without a result", WITHOUT, found.missing)
        parts.append(Part(title, "Without a result", f"{name}-without", missing))
    spent = sum(row.wall for row in found.rows)
    done = sum(row.state == COMPLETE for row in found.rows)
    text = json.dumps(found.suite.model_dump(mode="json"), indent=2)
    versions = table("Versions", ("package", "version"), list(found.as_dict()["versions"].items()))
    about = f"{paragraph(f'{done} rows in {span(spent)}.')}{versions}"
    about += f"<pre tabindex='0' aria-label='suite'>{html.escape(text)}</pre>"
    parts.append(Part(title, "Suite and environment", f"{name}-suite", about))
    return parts


def _against(each: Standing) -> dict[str, Any]:
    """A standing as a point with its interval against the reference, or against the best where there is none."""
    found = each.above_reference or each.above_best
    return {
        "cell": each.name, "mean": finite(found.mean), "low": finite(found.low), "high": finite(found.high),
        "tied": "not separated from the best" if each.tied else "worse than the best",
    }  # fmt: skip
