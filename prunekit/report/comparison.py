"""The rows of a comparison, on file, and what can be said of them: standings with intervals, ranks, tables."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.recipe.suite import Suite
from prunekit.report.statistics import Difference, Ranks, Standing, ranks, standings
from prunekit.system.files import Damaged, write_bytes, write_json

DENSE, REFERENCE = "dense", "uniform"  # names of the model as it was, and of the baseline that all are compared with
ROWS, SUMMARY, TABLE, PARQUET = "rows.jsonl", "summary.json", "leaderboard.md", "rows.parquet"
COMPLETE, REFUSED, FAILED, LEFT = "complete", "refused", "failed", "left out"


@dataclass(frozen=True)
class Row:
    """What came of one cell, on one model, at one sparsity, with one seed."""

    model: str
    cell: str
    sparsity: float  # asked; 0 of the dense model
    seed: int
    share: float = 1.0  # of the calibration text; below 1 it is judged on the search text, and only to choose cells
    state: str = COMPLETE
    reason: str = ""  # why there is no result
    recipe: str = ""  # digest
    label: str = ""  # of the perplexity
    perplexity: float | None = None  # None: not finite
    losses: tuple[float, ...] = ()  # nats per target of every window, to be paired
    objective: float | None = None
    parameters: int = 0
    removed: float = 0.0  # share of the budget's metric that is gone
    token_forwards: int = 0
    questions: int = 0
    seconds: float = 0.0  # of the cell alone, passes included as when they were made
    stages: Mapping[str, float] = field(default_factory=dict)  # of these, by stage
    wall: float = 0.0  # that this run took for it
    trace: tuple[tuple[int, float], ...] = ()  # (token-forwards, lowest loss so far), on the most tokens

    @property
    def key(self) -> tuple[str, str, float, int, float]:
        """What no other row has."""
        return self.model, self.cell, self.sparsity, self.seed, self.share


class Rows:
    """Rows in a file, one JSON object a line; begins with those that are there.

    Raises:
        Damaged: a whole line is no row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = dict[tuple[str, str, float, int, float], Row]()
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a killed writer leaves half a line
        for line in whole.splitlines():
            try:
                row = _row_of(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise Damaged(f"{path} was changed since it was written; begin again with --overwrite") from error
            self.found[row.key] = row
        if len(whole) != len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, row: Row) -> Row:
        """Write a row down, settled before anything goes on."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[row.key] = row
        return row

    def __iter__(self) -> Iterator[Row]:
        return iter(self.found.values())


def _row_of(values: Mapping[str, Any]) -> Row:
    found = {**values, "losses": tuple(values["losses"]), "trace": tuple(map(tuple, values["trace"]))}
    return Row(**found)


@dataclass(frozen=True, eq=False)
class Comparison:
    """The rows of a suite, and what can be said of them."""

    suite: Suite
    rows: Sequence[Row]
    output: Path | None = None

    @cached_property
    def places(self) -> list[tuple[str, float]]:
        """(model, sparsity) pairs that have final rows, in order."""
        return list(dict.fromkeys((row.model, row.sparsity) for row in self._final if row.cell != DENSE))

    def dense(self, model: str) -> Row:
        """The row of a model as it was."""
        return next(row for row in self.rows if row.model == model and row.cell == DENSE)

    def of(self, model: str, sparsity: float) -> dict[str, list[Row]]:
        """Complete rows by cell, one per seed."""
        found: dict[str, list[Row]] = {}
        for row in self._final:
            if (row.model, row.sparsity) == (model, sparsity) and row.cell != DENSE:
                found.setdefault(row.cell, []).append(row)
        return found

    def standings(self, model: str, sparsity: float) -> list[Standing]:
        """The cells on one model at one sparsity, the best first, and which differences are within noise."""
        losses = {
            cell: np.array([[math.inf if x is None else x for x in row.losses] for row in rows])
            for cell, rows in self.of(model, sparsity).items()
        }
        return standings(losses, REFERENCE) if losses else []

    def ranks(self) -> Ranks | None:
        """Mean ranks over models, sparsities and seeds."""
        blocks: dict[tuple[str, float, int], dict[str, float]] = {}
        for row in self._final:
            if row.cell != DENSE:
                value = math.inf if row.perplexity is None else row.perplexity
                blocks.setdefault((row.model, row.sparsity, row.seed), {})[row.cell] = value
        return ranks(list(blocks.values()))

    @property
    def without(self) -> list[Row]:
        """Rows of cells that have no result, and why."""
        return [row for row in self.rows if row.state != COMPLETE]

    def table(self) -> str:
        """All of it as Markdown."""
        lines = []
        for model, sparsity in self.places:
            dense, found = self.dense(model), self.of(model, sparsity)
            lines += [
                f"## {model}, {sparsity:.0%} removed",
                "",
                f"Dense: {number(dense.perplexity)} ({dense.label}). Intervals hold the difference with 95 %, over "
                "windows and seeds; = is not separated from the best.",
                "",
                "| | cell | perplexity | log ratio to the best | to uniform | removed | token-forwards | s | seeds |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
            for place, each in enumerate(self.standings(model, sparsity), start=1):
                rows = found[each.name]
                spread = f" ± {_spread(rows):.2f}" if len(rows) > 1 else ""
                mark = str(place) if not each.tied or place == 1 else "="
                other = "" if each.above_reference is None or each.name == REFERENCE else said(each.above_reference)
                lines.append(
                    f"| {mark} | {each.name} | {number(_mean(rows))}{spread} "
                    f"| {'' if place == 1 else said(each.above_best)} | {other} "
                    f"| {min(row.removed for row in rows):.2%} "
                    f"| {sum(row.token_forwards for row in rows) // len(rows):,} "
                    f"| {sum(row.seconds for row in rows) / len(rows):.0f} | {len(rows)} |"
                )
            lines.append("")
        if (ranked := self.ranks()) is not None:
            lines += [f"## Mean ranks over {ranked.blocks} blocks", ""]
            lines.append(
                f"Friedman's p that all are alike: {ranked.p:.3g}. Ranks that differ by less than "
                f"{ranked.critical:.2f} are not separated (Nemenyi, 95 %)."
            )
            lines += ["", "| cell | mean rank |", "|---|---|"]
            lines += [f"| {name} | {rank:.2f} |" for name, rank in sorted(ranked.mean.items(), key=lambda x: x[1])]
            lines.append("")
        if self.without:
            lines += [
                "## Without a result",
                "",
                "| cell | model | removed | seed | state | reason |",
                "|---|---|---|---|---|---|",
            ]
            lines += [
                f"| {r.cell} | {r.model} | {r.sparsity:.0%} | {r.seed} | {r.state} | {r.reason} |" for r in self.without
            ]
            lines.append("")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For programs: every standing with its intervals, ranks, and what has no result."""
        ranked = self.ranks()
        return {
            "schema": 1,
            "suite": self.suite.model_dump(mode="json"),
            "standings": [
                {"model": model, "sparsity": sparsity, "dense": self.dense(model).perplexity,
                 "cells": [_plain(asdict(each)) for each in self.standings(model, sparsity)]}
                for model, sparsity in self.places
            ],
            "ranks": None if ranked is None else _plain(asdict(ranked)),
            "without": [{"cell": r.cell, "model": r.model, "sparsity": r.sparsity, "seed": r.seed, "state": r.state,
                         "reason": r.reason} for r in self.without],
            "versions": {name: metadata.version(name) for name in ("prunekit", "torch", "transformers")},
        }  # fmt: skip

    @property
    def _final(self) -> list[Row]:
        return [row for row in self.rows if row.share == 1 and row.state == COMPLETE]


def write_summary(found: Comparison, place: Path) -> None:
    """Write what can be said so far, beside the rows."""
    write_json(place / SUMMARY, found.as_dict())
    write_bytes(place / TABLE, found.table().encode())
    if find_spec("pyarrow") is not None:
        write_parquet(found.rows, place / PARQUET)


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a table of columns.

    Raises:
        ImportError: pyarrow is not installed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{**asdict(row), "stages": json.dumps(dict(row.stages))} for row in rows])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())


def _mean(rows: Sequence[Row]) -> float | None:
    values = [row.perplexity for row in rows]
    return None if None in values else sum(v for v in values if v is not None) / len(values)


def _spread(rows: Sequence[Row]) -> float:
    values = [math.inf if row.perplexity is None else row.perplexity for row in rows]
    return (max(values) - min(values)) / 2


def number(value: float | None) -> str:
    """Of a perplexity, None being infinite."""
    return "inf" if value is None else f"{value:.2f}"


def said(found: Difference) -> str:
    """A difference with its interval, in words."""
    if not math.isfinite(found.low):
        return "no finite loss"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _plain(value: Any) -> Any:
    """As JSON can say it: what is not finite is null."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
