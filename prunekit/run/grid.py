"""The rows of a comparison as they come: on file, in tables, and as one progress over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from prunekit.recipe.suite import Suite
from prunekit.report.comparison import COMPLETE, DENSE, LEFT, REFERENCE, Comparison, Row, Rows, number, write_summary
from prunekit.run.halving import WHOLE, Costs, Halving, Makers
from prunekit.system.progress import Stage, span

OFTEN = 20  # times as long as they take to write, tables are left as they are

Key = tuple[str, float, int, float]
"""Which row of a model: (cell, sparsity, seed, share of the calibration text)."""


@dataclass
class Grid:
    """How far the whole comparison is, as one stage, and its tables as they stand."""

    suite: Suite
    rows: Rows
    place: Path
    stage: Stage
    models: int  # to come
    each: int  # rows of a model, at most
    end: float | None  # what the clock says when all has to be done
    workers: int = 1  # that make rows side by side
    until: float | None = None  # when the model at work has to be
    done: int = 0
    writing: float = 0.0  # seconds that it took to write the tables
    _written: float = 0.0

    def begin_model(self) -> float | None:
        """Go on to the next model; when it has to be done: at its share of the time that is left."""
        now = time.perf_counter()
        self.until = None if self.end is None else now + (self.end - now) / self.models
        self.models -= 1
        self.expect(self.each, None if self.until is None else max(0.0, self.until - now))
        return self.until

    def expect(self, coming: int, seconds: float | None) -> None:
        """Say how many rows of the model at work may come, and what they take by the clock; None: that is unknown."""
        if seconds is not None and self.models:
            known = [row.wall for row in self.rows if row.cell != DENSE]
            if self.end is not None and self.until is not None:
                seconds += max(0.0, self.end - self.until)
            elif known:
                seconds += self.models * self.each * sum(known) / len(known) / self.workers
        self.stage.expect(self.done + coming + self.models * self.each, seconds)

    def count(self, said: str) -> None:
        """Show that a row is there."""
        self.done += 1
        self.stage.advance(1, said)

    def note(self, said: str) -> None:
        """Show what is at work."""
        self.stage.advance(0, said)

    def write_at_times(self) -> None:
        """Write the tables, unless that would cost much of the time: of hundreds of cells it takes seconds."""
        if time.perf_counter() - self._written >= OFTEN * self.writing:
            self.write()

    def write(self) -> None:
        """Write the tables of all rows that are there."""
        began = time.perf_counter()
        write_summary(Comparison(self.suite, list(self.rows), self.place), self.place)
        self._written = time.perf_counter()
        self.writing = self._written - began


@dataclass
class Column:
    """The rows of one model: those on file, and those to come."""

    grid: Grid
    model: str
    cells: Sequence[str]  # by name

    @property
    def whole(self) -> list[Key]:
        """Every row on all of the text, in order."""
        suite = self.grid.suite
        return [
            (cell, sparsity, seed, WHOLE)
            for seed in range(suite.seeds) for sparsity in suite.sparsity for cell in self.cells
        ]  # fmt: skip

    @property
    def rows(self) -> list[Row]:
        """Those that are there, but for that of the model as it was."""
        return [row for row in self.grid.rows if row.model == self.model and row.cell != DENSE]

    @property
    def dense(self) -> Row | None:
        """That of the model as it was."""
        return self.grid.rows.found.get((self.model, DENSE, 0.0, 0, WHOLE))

    def find(self, key: Key) -> Row | None:
        """A row that is there and need not be made."""
        row = self.grid.rows.found.get((self.model, *key))
        return None if row is None or row.state == LEFT else row

    def keep(self, row: Row) -> Row:
        """Write a row down, and the tables with it."""
        self.grid.rows.add(row)
        self.grid.write_at_times()
        return row

    def count(self, row: Row) -> Row:
        """Show that a row is there."""
        self.grid.count(self.said(row) if row.cell == DENSE else f"{self.said(row)}, {span(row.seconds)}")
        return row

    def said(self, row: Row) -> str:
        """A row in a few words."""
        model = f"{Path(self.model).name}: " if len(self.grid.suite.models) > 1 else ""
        return f"{model}{row.cell} {number(row.perplexity) if row.state == COMPLETE else row.state}"

    def leave_out(self, cell: str, sparsity: float, seed: int, share: float, reason: str) -> None:
        """Say that there was no time for a row."""
        row = Row(self.model, cell, sparsity, seed, share, LEFT, reason)
        if row.key not in self.grid.rows.found:
            self.grid.rows.add(row)

    def foreseen(self, coming: Iterable[Key]) -> float | None:
        """Seconds of rows that are not there yet, as of those that are: of the same cell, or of all."""
        walls = dict[str, list[float]]()
        for row in self.rows:
            walls.setdefault(row.cell, []).append(row.wall)
        every = [wall for some in walls.values() for wall in some]
        if not every:
            return None
        return sum(fmean(walls.get(key[0], every)) for key in coming if self.find(key) is None)

    def halve(self, makers: Makers, until: float, evaluation: float, say: Callable[[str], None]) -> None:
        """Make the better cells on all of the text, as many as there is time for.

        Args:
            makers: of rows.
            until: what the clock says when all has to be done.
            evaluation: seconds that judging on the evaluation text takes.
            say: tells the user a line.
        """
        costs, suite = Costs(evaluation), self.grid.suite
        for row in self.rows:
            costs.add(row)
        Halving(
            self.cells, suite.sparsity, suite.seeds, REFERENCE, until, costs, makers,
            known=lambda *key: self.find(key) is not None, leave_out=self.leave_out, expect=self.grid.expect,
            say=say, after=lambda: self.grid.writing, clock=time.perf_counter,
        ).run()  # fmt: skip
