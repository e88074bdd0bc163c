"""The sections about a comparison: a leaderboard per model and sparsity, ranks, what has no result, the suite."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
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
    REFERENCE,
    ROWS,
    SECONDS,
    WITHOUT,
    Comparison,
    Entry,
    Row,
    Rows,
)  # fmt: skip
from prunekit.report.markup import folded, paragraph, table
from prunekit.report.page import charts
from prunekit.report.page.grid import drawn_grids
from prunekit.report.page.paces import parts_of_paces
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
FIRST = 5  # cells of a long leaderboard that are said before everything else
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
    for i, model in enumerate(models):
        parts += _parts_of_sizes(found, model, title, f"{name}-sizes-{i}")
        parts += parts_of_paces(found, model, title, f"{name}-paces-{i}")
    if (ranked := found.ranks()) is not None:
        text = paragraph(
            f"Friedman's p that all are alike: {ranked.p:.3g}, over {ranked.blocks} blocks of model and "
            f"sparsity. Ranks that differ by less than {ranked.critical:.2f} are not separated (Nemenyi, 95 %)."
        )
        drawn = [charts.ranks(f"{name}-ranks-chart", ranked.mean, ranked.critical)]
        parts.append(Part(title, "Mean ranks", f"{name}-ranks", text, drawn))
    if found.without:
        missing = table("Cells without a result", WITHOUT, found.missing, first=charts.SHOWN)
        parts.append(Part(title, "Without a result", f"{name}-without", missing))
    parts.append(Part(title, "What these numbers do not say", f"{name}-limits", _limits(found, models)))
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
    notes = paragraph(DIFFERENCES)
    costs = folded("Seconds of every cell by stage", _stages_table(found, board)) if _stages(found, board) else ""
    if pictures or len(board) > charts.SHOWN:
        intro += _first_cells(board)
    if pictures:
        parts = [
            Part(title, heading, anchor, intro, pictures, numbers),
            Part(title, f"{heading}: leaderboard", f"{anchor}-board", notes, drawn, costs + listed),
        ]
    elif len(board) > charts.SHOWN:
        parts = [Part(title, heading, anchor, intro + notes, drawn, costs + listed)]
    else:  # short: it comes first, so that it is seen on a phone as well
        parts = [Part(title, heading, anchor, intro + listed + notes, drawn, costs)]
    if limited := found.limited(model, sparsity):
        parts[-1] = replace(parts[-1], after=parts[-1].after + paragraph(limited))
    if near := found.optima(model, sparsity):
        listed = table("Distance to the exact optimum", OPTIMA, near, sortable=True, first=charts.SHOWN)
        heading = f"{heading}: distance to the exact optimum"
        parts.append(Part(title, heading, f"{anchor}-optimum", paragraph(OPTIMA_TEXT) + listed))
    return parts


def _said(found: Comparison, model: str, board: Sequence[Entry]) -> str:
    """The result in a few sentences."""
    first, tied = board[0], sum(each.standing.tied for each in board) - 1
    best = f"The best of {len(board)} is {first.standing.name}, {number(first.perplexity)}; "
    best += f"{tied} {'is' if tied == 1 else 'are'} not separated from it. " if tied else "no other is level with it. "
    return f"{best if math.isfinite(first.perplexity) else ''}{found.words_of_dense(model)}"


def _first_cells(board: Sequence[Entry]) -> str:
    """The best few, as a short table."""
    rows = [(each.cells[0], each.standing.name, each.cells[2]) for each in board[:FIRST]]
    return table(f"The first {len(rows)} of {len(board)}", HEADS[:3], rows)


def _parts_of_sizes(found: Comparison, model: str, title: str, anchor: str) -> list[Part]:
    """Size against perplexity, where a model was pruned to several sparsities."""
    places = [sparsity for each, sparsity in found.places if each == model]
    if len(places) < 2:
        return []
    boards = {sparsity: {e.standing.name: e for e in found.leaderboard(model, sparsity)} for sparsity in places}
    everywhere = [cell for cell in boards[places[0]] if all(
        cell in board and math.isfinite(board[cell].perplexity) for board in boards.values()
    )]  # fmt: skip
    order = sorted(everywhere, key=lambda cell: sum(board[cell].standing.loss for board in boards.values()))
    shown = order[: len(charts.MANY)]
    if REFERENCE in order and REFERENCE not in shown:
        shown[-1] = REFERENCE
    if not shown:
        return []
    whole = finite(found.dense(model).perplexity)
    dense = [] if whole is None else [{"kept": 1.0, "perplexity": whole}]
    rows = [
        {"cell": cell, **point}
        for cell in shown
        for point in [
            *dense,
            *({"kept": 1 - sum(row.removed for row in board[cell].rows) / len(board[cell].rows),
               "perplexity": board[cell].perplexity} for board in boards.values()),
        ]
    ]  # fmt: skip
    rows += [{"cell": "", **point} for point in dense]
    drawn = charts.sizes(f"{anchor}-chart", rows, _counted(found.suite), len(order))
    text = paragraph(f"Cells with a result at every sparsity, the best first by their mean loss; {REFERENCE} always.")
    return [Part(title, f"{Path(model).name}: size against perplexity", anchor, text, [drawn])]


def _counted(suite: Suite) -> str:
    """What the budget of a suite counts."""
    metric = suite.set.get("metric", "parameters")
    name = metric.get("name", "parameters") if isinstance(metric, Mapping) else str(metric)
    return "the dense model's time, by the price table" if name == "latency" else f"the dense model's {name}"


def _limits(found: Comparison, models: Sequence[str]) -> str:
    """What a comparison is too small to say."""
    seeds = max((len(each.rows) for place in found.places for each in found.leaderboard(*place)), default=1)
    dense = [row for row in found.rows if row.cell == DENSE]
    texts = ", ".join(dict.fromkeys(f"{row.label} ({len(row.losses):,} windows)" for row in dense))
    tokens = found.suite.set.get("data.calibration_tokens")
    said = [
        f"Text: perplexities are of {texts or 'no text yet'}, and say little of what a model can do."
        + (f" Every cell was calibrated on {tokens:,} tokens; with more the order may be another."
           if isinstance(tokens, int) else ""),
        "Seeds: one, so that intervals are over windows of text alone; another draw of calibration text may do more."
        if seeds == 1 else f"Seeds: {seeds}; so few make intervals over seeds rough.",
        f"Models: {len(models)}. "
        + ("Of another model nothing is said." if len(models) == 1 else "Of others nothing is said."),
        "A tie, marked =, means that this text cannot separate a cell from the best after Holm's correction, not that "
        "they are alike; the first place among ties is an accident.",
        "Seconds are of this machine, with whatever else it did. "
        + ("How fast pruned models are is of this machine too, and of what was timed; with other prompts, batches or "
           "kernels it is another." if found.is_timed else "How fast pruned models are was not measured."),
    ]  # fmt: skip
    return "<ul>" + "".join(f"<li>{html.escape(each)}</li>" for each in said) + "</ul>"


def _steps(found: Comparison) -> list[str]:
    """All stages, those that most rows begin with first."""
    several = dict.fromkeys(stage for row in found.rows for stage in row.stages)
    places = {stage: [list(row.stages).index(stage) for row in found.rows if stage in row.stages] for stage in several}
    return sorted(several, key=lambda stage: sum(places[stage]) / len(places[stage]))


def _stages(found: Comparison, board: Sequence[Entry]) -> list[dict[str, Any]]:
    """Seconds of every cell by stage, means over seeds."""
    order = _steps(found)
    return [
        {"cell": each.standing.name, "stage": stage, "place": place, "seconds": spent}
        for each in board for place, stage in enumerate(order)
        if (spent := sum(row.stages.get(stage, 0.0) for row in each.rows) / len(each.rows)) > 0
    ]  # fmt: skip


def _stages_table(found: Comparison, board: Sequence[Entry]) -> str:
    spent = {(each["cell"], each["stage"]): each["seconds"] for each in _stages(found, board)}
    order = list(dict.fromkeys(stage for _, stage in spent))
    rows = [
        (each.standing.name, *(number(spent.get((each.standing.name, stage), 0.0), 1) for stage in order))
        for each in board
    ]
    return table("Seconds by stage", ("cell", *order), rows, sortable=True, first=charts.SHOWN)


def _pictures(found: Comparison, model: str, sparsity: float, anchor: str) -> list[charts.Chart]:
    """Intervals, cost, and what searches have at any time; of many cells the first, that can be told apart."""
    board, rows = found.leaderboard(model, sparsity), found.of(model, sparsity)
    several, front = len(board) > charts.SHOWN, _front(found, [row for some in rows.values() for row in some])
    points = [
        {"cell": cell, "perplexity": row.perplexity, "seconds": max(found.seconds(row), 0.01), "seed": row.seed,
         "tokens": row.token_forwards,
         "label": cell if row.key in front or (row.seed == 0 and not several) else ""}
        for cell, some in rows.items() for row in some if row.perplexity is not None
    ]  # fmt: skip
    to = REFERENCE if any(each.standing.above_reference for each in board) else board[0].standing.name
    drawn = [
        charts.intervals(
            f"{anchor}-intervals", [_against(each.standing) for each in board[: charts.SHOWN]], to, len(board)
        ),
        charts.tradeoff(f"{anchor}-cost", points),
    ]
    if spent := _stages(found, board[: charts.SHOWN]):
        drawn.append(charts.stages(f"{anchor}-stages", spent, _steps(found), len(board)))
    searches = [each.rows[0] for each in board if _searches(each.rows[0])]
    if searches:
        traces = [
            {"cell": row.cell, "tokens": tokens, "loss": loss}
            for row in searches[: len(charts.MANY)] for tokens, loss in _until_the_end(row)
        ]  # fmt: skip
        drawn.append(charts.anytime(f"{anchor}-anytime", traces, len(searches)))
    return drawn


def _searches(row: Row) -> bool:
    """Whether there is a search to look at: what asks one question, such as a formula, has its answer at once."""
    return any(tokens for tokens, _ in row.trace) and max(row.questions, len(row.trace)) > 1


def _until_the_end(row: Row) -> list[tuple[int, float]]:
    """The steps of a search; what it asked after the last of them lowered nothing."""
    steps = [(tokens, loss) for tokens, loss in row.trace if tokens]
    last, loss = steps[-1]
    return [*steps, (row.token_forwards, loss)] if row.token_forwards > last else steps


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
