"""The grid of a comparison as pictures: one side against another, how far every cell is above the best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

from prunekit.recipe.suite import Suite, cell_of
from prunekit.report.comparison import Entry
from prunekit.report.markup import folded, table
from prunekit.report.page import charts
from prunekit.report.words import finite, number, said

LEAST = 3  # plug-ins on either side that make a picture worth its room
SHARE = 0.9  # of the cells that have a colour of their own; the worst have that of the end of the scale
NONE = "×"  # marks a cell that has no result


def drawn_grids(name: str, suite: Suite, board: Sequence[Entry]) -> tuple[list[charts.Chart], str]:
    """Draw the grid of a suite, where it has two sides of at least `LEAST`: a picture for each plug-in of the third.

    Args:
        name: begins those of the pictures.
        suite: says which sides there are.
        board: what is known of the cells, on one model at one sparsity.

    Returns:
        The pictures, and their perplexities as tables that are folded away.
    """
    axes = suite.axes()
    sides = sorted(sorted(range(len(axes)), key=lambda i: -len(axes[i][1]))[:2])
    if len(sides) < 2 or any(len(axes[i][1]) < LEAST for i in sides):
        return [], ""
    third = next((i for i in range(len(axes)) if i not in sides), None)
    known = {entry.standing.name: entry for entry in board}
    found, words = list[list[dict[str, Any]]](), (axes[sides[0]][0], axes[sides[1]][0])
    others = [""] if third is None else axes[third][1]
    for other in others:
        tiles = list[dict[str, Any]]()
        for row, column in product(axes[sides[0]][1], axes[sides[1]][1]):
            at = {sides[0]: row, sides[1]: column} | ({} if third is None else {third: other})
            tiles.append(_tile(row, column, cell_of([at[i] for i in range(len(axes))]), known))
        found.append(_sorted(tiles))
    above = sorted(tile["above"] for tiles in found for tile in tiles if tile["above"] is not None)
    if not above:
        return [], ""
    most = max(above[math.ceil(SHARE * len(above)) - 1], 0.01)
    pictures, tables = list[charts.Chart](), ""
    for i, (other, tiles) in enumerate(zip(others, found, strict=True)):
        where = f", with {axes[third][0]} {other}" if third is not None and len(others) > 1 else ""
        pictures.append(charts.grid(f"{name}-{i}", tiles, words, where, round(most, 2)))
        tables += folded(f"Perplexity of every {words[0]} with every {words[1]}{where}", _numbers(words, tiles))
    return pictures, tables


def _tile(row: str, column: str, cell: str, known: Mapping[str, Entry]) -> dict[str, Any]:
    found = {"row": row, "column": column, "cell": cell}
    entry = known.get(cell)
    if entry is None:
        return found | {"above": None, "perplexity": None, "interval": "", "mark": NONE, "state": "no result"}
    standing, first = entry.standing, entry.place == 1
    above, mark = finite(standing.above_best.mean), "1" if first else "=" if standing.tied else ""
    state = "the best" if first else "not separated from the best" if standing.tied else "worse than the best"
    return found | {
        "above": above, "perplexity": entry.perplexity if math.isfinite(entry.perplexity) else None,
        "interval": "" if first else said(standing.above_best), "mark": mark if above is not None else NONE,
        "state": state,
    }  # fmt: skip


def _sorted(tiles: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows and columns in the order of their medians; what has no result counts as the worst."""
    medians = {
        side: {name: median(_value(tile) for tile in tiles if tile[side] == name) for name in _names(tiles, side)}
        for side in ("row", "column")
    }
    return sorted(tiles, key=lambda t: [(medians[side][t[side]], t[side]) for side in ("row", "column")])


def _numbers(words: tuple[str, str], tiles: Sequence[Mapping[str, Any]]) -> str:
    """The same as a table."""
    across = _names(tiles, "column")
    rows = [[row, *_said(tiles[i * len(across) : (i + 1) * len(across)])] for i, row in enumerate(_names(tiles, "row"))]
    return table(f"Perplexity, {words[0]} by {words[1]}", (words[0], *across), rows, sortable=True)


def _said(tiles: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for tile in tiles:
        yield "no result" if tile["perplexity"] is None else f"{number(tile['perplexity'])} {tile['mark']}".strip()


def _names(tiles: Sequence[Mapping[str, Any]], side: str) -> list[str]:
    return list(dict.fromkeys(tile[side] for tile in tiles))


def _value(tile: Mapping[str, Any]) -> float:
    return math.inf if tile["above"] is None else float(tile["above"])
