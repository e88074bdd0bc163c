"""Every cell of a suite on the same tokens, at the same price, judged on the same windows; kept row by row.

A cell is what `prune` does, short of the export. What two cells have in common is not done twice: a model is opened
once, a calibration pass lies on a shelf by what determines it, a recipe that two cells come to is run once.
"""

from __future__ import annotations

import hashlib
import json
import math
import time as clocks
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from prunekit.data.tokens import TokenBatch
from prunekit.data.windows import whole_windows
from prunekit.errors import WrongInput, first_line
from prunekit.measure.perplexity import Perplexity, perplexity
from prunekit.plugins.registry import identify_code
from prunekit.recipe.resolve import Parts, resolve
from prunekit.recipe.suite import Cell, Suite
from prunekit.report import document as reporting
from prunekit.report.comparison import (
    COMPLETE,
    DENSE,
    FAILED,
    LEFT,
    REFERENCE,
    REFUSED,
    ROWS,
    Comparison,
    Row,
    Rows,
    number,
    write_summary,
)
from prunekit.run.bench import Bench, Made
from prunekit.run.halving import SHARES, WHOLE, Costs, Halving
from prunekit.run.pace import announcement, check_speed, identity_of, seconds_of, time_cell, time_dense
from prunekit.run.session import MORE, Job, open_session
from prunekit.run.workplace import claimed
from prunekit.search.exact import Optimum
from prunekit.search.ledger import Ledger
from prunekit.system.progress import Stage, span

# of a row, for programs
TOLD = ("perplexity", "objective", "optimum", "reached", "parameters", "removed", "token_forwards", "seconds",
        "prefill_ratio", "decode_ratio")  # fmt: skip
FEW = 8  # cells that a line names
LEAST = 8  # windows that a cell is judged on where it is tried on a part of the text
OFTEN = 20  # times as long as they take to write, tables are left as they are


def compare(suite: Suite, job: Job, *, time: float | None = None, disk: int = 20 << 30) -> Comparison:
    """Run all cells of a suite that have no row yet, and say what can be said of them.

    Args:
        suite: what is compared, on which models.
        job: the folder of the comparison, and whether an earlier one is continued or replaced; or a model in memory.
        time: seconds to spend; then cells are tried on a quarter of the text, the better ones on half, and the best of
            these on all of it, as many as there is time for; nothing is begun that would not be done in time. Where the
            first step takes more than its third of the time, the second is left out. None: all cells on all of it, as
            long as it takes.
        disk: bytes of candidates to keep for cells to come.

    Returns:
        All rows, those of earlier calls included.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
    """
    if find_spec("scipy") is None:
        raise WrongInput("prunekit compare needs scipy, which is not installed: pip install 'prunekit[compare]'")
    began, output, cells, base = clocks.perf_counter(), job.output, suite.every_cell(), suite.base()
    assert output is not None  # a comparison is on disk
    models = list(suite.models) or ([] if base.model is None else [base.model])
    if job.model is not None:
        models = [type(job.model).__name__]
    if not models:
        raise WrongInput("no model was given; name one, several by comma, or a suite with models")
    if base.family or base.time is not None:
        raise WrongInput("a comparison has sparsities and a time of its own; leave family and time of the recipe away")
    for name in set(models):
        if models.count(name) > 1:
            raise WrongInput(f"model {name} is given twice; give it once")
    check_speed(suite, job)
    versions = {name: metadata.version(name) for name in ("prunekit", "torch", "transformers")}
    identity: dict[str, Any] = {"suite": identity_of(suite), "models": models, "versions": versions}
    identity |= identify_code([cell.recipe.model_dump(mode="json") for cell in cells])
    with claimed(output, identity, "a comparison", resume=job.resume, overwrite=job.overwrite) as place:
        rows = Rows(place / ROWS)
        job.progress.describe({"suite": suite.model_dump(mode="json"), "models": models})
        end = None if time is None else began + time - sum(row.wall for row in rows)
        each = len(suite.sparsity) * len(cells) * (suite.seeds + (time is not None)) + 1
        with job.progress.stage("compare", len(models) * each) as stage:
            grid = _Grid(suite, rows, place, stage, len(models), each, end)
            for i, model in enumerate(models):
                over = base if job.model is not None else base.with_overrides({"model": model})
                until = grid.begin_model()
                with _bench(resolve(over), job, place / f"model-{i}", disk) as bench:
                    _Work(bench, suite, cells, model, rows, grid, until).run()
                grid.write()
        return Comparison(suite, list(rows), place)


@dataclass
class _Grid:
    """How far the whole comparison is, as one stage, and its tables as they stand."""

    suite: Suite
    rows: Rows
    place: Path
    stage: Stage
    models: int  # to come
    each: int  # rows of a model, at most
    end: float | None  # what the clock says when all has to be done
    until: float | None = None  # when the model at work has to be
    done: int = 0
    writing: float = 0.0  # seconds that it took to write the tables
    _written: float = 0.0

    def begin_model(self) -> float | None:
        """Go on to the next model; when it has to be done: at its share of the time that is left."""
        now = clocks.perf_counter()
        self.until = None if self.end is None else now + (self.end - now) / self.models
        self.models -= 1
        self.expect(self.each, None if self.until is None else max(0.0, self.until - now))
        return self.until

    def expect(self, coming: int, seconds: float | None) -> None:
        """Say how many rows of the model at work may come, and what they take; None: that is unknown."""
        if seconds is not None and self.models:
            known = [row.wall for row in self.rows if row.cell != DENSE]
            if self.end is not None and self.until is not None:
                seconds += max(0.0, self.end - self.until)
            elif known:
                seconds += self.models * self.each * sum(known) / len(known)
        self.stage.expect(self.done + coming + self.models * self.each, seconds)

    def count(self, said: str) -> None:
        """Show that a row is there."""
        self.done += 1
        self.stage.advance(1, said)

    def write_at_times(self) -> None:
        """Write the tables, unless that would cost much of the time: of hundreds of cells it takes seconds."""
        if clocks.perf_counter() - self._written >= OFTEN * self.writing:
            self.write()

    def write(self) -> None:
        """Write the tables of all rows that are there."""
        began = clocks.perf_counter()
        write_summary(Comparison(self.suite, list(self.rows), self.place), self.place)
        self._written = clocks.perf_counter()
        self.writing = self._written - began


@contextmanager
def _bench(parts: Parts, job: Job, folder: Path, disk: int) -> Iterator[Bench]:
    """An open model, in a folder of its own for what cells share."""
    folder.mkdir(exist_ok=True)
    session = open_session(parts, replace(job, output=folder))
    if session.draws.search.answers is not None:
        raise WrongInput("questions have no perplexity to compare; give a text as data.search_dataset")
    session = session.with_prices(folder)
    session.make_spaces()  # can the budget be met, at these prices?
    with session.work_in(nullcontext(folder)) as (session, place):
        yield Bench(session, place, disk, exact=True)


@dataclass
class _Work:
    """The cells of a suite on one model."""

    bench: Bench
    suite: Suite
    cells: Sequence[Cell]
    model: str
    rows: Rows
    grid: _Grid
    until: float | None  # what the clock says when all has to be done; None: it takes as long as it takes

    def run(self) -> None:
        """Make all rows that are not there yet."""
        dense = self._dense()
        for share in SHARES if self.until is not None else (WHOLE,):
            self._announce(share)
        self._warn_of_limit()
        if self.suite.speed:
            many = len(self.suite.sparsity) * len(self.cells) * self.suite.seeds
            self.bench.session.progress.say(announcement(dense, many))
        self.grid.count(self._said("dense", dense))
        if self.until is None:
            self._all()
        else:
            self._in_time(self.until, dense)

    def _all(self) -> None:
        """Every cell on all of the text."""
        coming = [
            (cell, sparsity, seed)
            for seed in range(self.suite.seeds) for sparsity in self.suite.sparsity for cell in self.cells
        ]  # fmt: skip
        for i, (cell, sparsity, seed) in enumerate(coming):
            self.grid.expect(len(coming) - i, self._foreseen(coming[i:]))
            self._row(cell, sparsity, seed, WHOLE)

    def _foreseen(self, coming: Sequence[tuple[Cell, float, int]]) -> float | None:
        """Seconds of rows that are not there yet, as of those that are: of the same cell, or of all."""
        walls = dict[str, list[float]]()
        for row in self.rows:
            if row.model == self.model and row.cell != DENSE:
                walls.setdefault(row.cell, []).append(row.wall)
        every = [wall for some in walls.values() for wall in some]
        if not every:
            return None
        missing = [cell.name for cell, sparsity, seed in coming if not self._is_known(cell.name, sparsity, seed, WHOLE)]
        return sum(fmean(walls.get(name, every)) for name in missing)

    def _in_time(self, until: float, dense: Row) -> None:
        """The better cells on all of the text, as many as there is time for."""
        by_name, costs = {cell.name: cell for cell in self.cells}, Costs(dense.seconds + seconds_of(dense))
        for row in self.rows:
            if row.model == self.model:
                costs.add(row)
        Halving(
            list(by_name), self.suite.sparsity, self.suite.seeds, REFERENCE, until, costs,
            make=lambda name, *place: self._row(by_name[name], *place), known=self._is_known,
            leave_out=self._leave_out, expect=self.grid.expect, say=self.bench.session.progress.say,
            after=lambda: self.grid.writing, clock=clocks.perf_counter,
        ).run()  # fmt: skip

    def _is_known(self, cell: str, sparsity: float, seed: int, share: float) -> bool:
        """Whether a row is there that need not be made."""
        row = self.rows.found.get((self.model, cell, sparsity, seed, share))
        return row is not None and row.state != LEFT

    def _dense(self) -> Row:
        """The model as it was; its row says of which weights and which text all rows are.

        Raises:
            WrongInput: the rows on file are of others.
        """
        session = self.bench.session
        text = [part.digest for part in (session.draws.calibration, session.draws.search, session.draws.evaluation)]
        of = hashlib.sha256(json.dumps([session.dense.fingerprint, text]).encode()).hexdigest()
        known = self.rows.found.get((self.model, DENSE, 0.0, 0, 1.0))
        if known is not None and known.recipe != of:
            raise WrongInput(
                f"{self.rows.path} has rows of other weights or text than {self.model} and its data have now; choose "
                "another --output, or discard them with --overwrite"
            )
        if known is not None:
            return known
        begun = clocks.perf_counter()
        timed = time_dense(session) if self.suite.speed else {}
        judging = clocks.perf_counter()
        measured = perplexity(session.dense.model, session.draws.evaluation, progress=session.progress)
        now, size = clocks.perf_counter(), reporting.count(session.dense.model)
        row = Row(self.model, DENSE, 0.0, 0, recipe=of, wall=now - begun, seconds=now - judging, parameters=size)
        return self.rows.add(replace(row, **_measured(measured), **timed))

    def _leave_out(self, cell: str, sparsity: float, seed: int, share: float, reason: str) -> None:
        row = Row(self.model, cell, sparsity, seed, share, LEFT, reason)
        if row.key not in self.rows.found:
            self.rows.add(row)

    def _announce(self, share: float) -> None:
        """Tell the bench which cells come on so much of the text; what cannot be resolved is refused in its turn."""
        for sparsity in self.suite.sparsity:
            for seed in range(self.suite.seeds if share == 1 else 1):
                for cell in self.cells:
                    with suppress(WrongInput, RuntimeError):
                        self.bench.announce(self._parts(cell, Row(self.model, cell.name, sparsity, seed, share)))

    def _warn_of_limit(self) -> None:
        """Name the cells whose searches the limit will end among their probes: they will look alike."""
        asked, found = dict[str, bool](), dict[float, list[str]]()
        if self.bench.session.parts.recipe.search_budget is None:
            return
        for sparsity in self.suite.sparsity:
            for cell in self.cells:
                with suppress(WrongInput, RuntimeError):
                    parts = self._parts(cell, Row(self.model, cell.name, sparsity, 0))
                    search = json.dumps([sparsity, parts.recipe.allocator, parts.recipe.objective], sort_keys=True)
                    if search not in asked:
                        asked[search] = self.bench.ends_in_probes(parts)
                    if asked[search]:
                        found.setdefault(sparsity, []).append(cell.name)
        for sparsity, names in found.items():
            some = ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
            self.bench.session.progress.say(
                f"warning: at {sparsity:.0%} search_budget is spent for the most part on probes by {len(names)} of "
                f"{len(self.cells)} cells, whose answers are the best of a table or near it, and look alike: {some}; "
                f"{MORE}"
            )

    def _row(self, cell: Cell, sparsity: float, seed: int, share: float) -> Row:
        """The row of a cell: that on file, that of the same recipe under another name, or a new one."""
        known = self.rows.found.get((self.model, cell.name, sparsity, seed, share))
        if known is None or known.state == LEFT:
            begun = clocks.perf_counter()
            blank = Row(self.model, cell.name, sparsity, seed, share)
            try:
                made = self._tried(cell, blank)
            except WrongInput as error:
                made = replace(blank, state=REFUSED, reason=first_line(error))
            except (RuntimeError, ArithmeticError, MemoryError) as error:  # broken promises, memory, factorisations
                made = replace(blank, state=FAILED, reason=f"{type(error).__name__}: {first_line(error)}")
            known = self.rows.add(replace(made, wall=clocks.perf_counter() - begun))
            self.grid.write_at_times()
        self.grid.count(f"{self._said(cell.name, known)}, {span(known.seconds)}")
        return known

    def _said(self, name: str, row: Row) -> str:
        """A row in a few words."""
        model = f"{Path(self.model).name}: " if len(self.suite.models) > 1 else ""
        return f"{model}{name} {number(row.perplexity) if row.state == COMPLETE else row.state}"

    def _parts(self, cell: Cell, blank: Row) -> Parts:
        """What is run for a row.

        Raises:
            WrongInput: there can be no such recipe.
        """
        session = self.bench.session
        recipe = cell.under(session.parts.recipe, blank.sparsity, blank.seed)
        if blank.share < 1:
            tokens = session.draws.calibration
            some = max(1, whole_windows(round(blank.share * tokens.n_tokens), tokens.seqlen))
            recipe = recipe.with_overrides({"data.calibration_tokens": some * tokens.seqlen})
            if (parts := resolve(recipe)).learns:
                lessons = recipe.data.recovery_tokens or parts.amounts["recovery"]
                recipe = recipe.with_overrides({"data.recovery_tokens": math.ceil(blank.share * lessons)})
        return resolve(recipe)

    def _tried(self, cell: Cell, blank: Row) -> Row:
        """As `_made`; where it cannot be, once more without what its calibration pass measures for others."""
        parts = self._parts(cell, blank)
        try:
            return self._made(parts, blank)
        except (RuntimeError, ArithmeticError, MemoryError):
            if not self.bench.separate(parts):
                raise
        return self._made(parts, blank)

    def _made(self, parts: Parts, blank: Row) -> Row:
        session = self.bench.session
        for row in self.rows:
            if (row.model, row.recipe, row.share, row.state) == (blank.model, parts.digest, blank.share, COMPLETE):
                return replace(row, cell=blank.cell)
        with self.bench.make(parts, self._part(blank)) as made:
            text = session.draws.evaluation if blank.share == 1 else _part_of(session.draws.search, blank.share)
            measured = perplexity(made.small, text, progress=session.progress)
            ledger, clock, budget = made.run.ledger, made.run.clock.seconds, made.run.whole.budget
            spent = budget.outside + made.run.whole.cost(made.plan)
            told = reporting.searched(ledger)
            optimum = {} if made.optimum is None else _known(made.optimum)
            row = replace(
                blank, recipe=parts.digest, objective=_finite(made.objective), parameters=made.parameters,
                removed=float(1 - spent / budget.dense), token_forwards=told["token_forwards"],
                questions=told["questions"], limited=_limited(ledger), seconds=sum(clock.values()),
                stages=dict(clock), passes=made.run.clock.all_passes, trace=_trace(ledger.text()),
                **_measured(measured), **optimum, **self._timed(made, blank),
            )  # fmt: skip
            values = {name: getattr(row, name) for name in TOLD}
            made.run.progress.measured({name: value for name, value in values.items() if value is not None})
            return row

    def _timed(self, made: Made, blank: Row) -> dict[str, Any]:
        """How fast a cell is that was judged on all of the text, where that is asked for."""
        if not self.suite.speed or blank.share < 1:
            return {}
        dense = self.rows.found[self.model, DENSE, 0.0, 0, 1.0]
        return time_cell(self.bench.session, made.small, dense)

    def _part(self, blank: Row) -> str:
        """The name of a cell among all parts of the comparison."""
        several = [Path(self.model).name] if len(self.suite.models) > 1 else []
        share = [] if blank.share == 1 else [f"{blank.share:.0%} of the text"]
        return ", ".join([*several, blank.cell, f"{blank.sparsity:.0%}", f"seed {blank.seed}", *share])


def _part_of(text: TokenBatch, share: float) -> TokenBatch:
    """So much of a text, spread over it, and `LEAST` windows or more: judging costs as much as a calibration pass."""
    windows = len(text.ids)
    return text.spread(min(windows, max(LEAST, round(share * windows))) * text.seqlen)


def _measured(found: Perplexity) -> dict[str, Any]:
    return {
        "perplexity": _finite(found.value),
        "losses": tuple(_finite(loss) for loss in found.losses),
        "label": found.label,
    }


def _known(found: Optimum) -> dict[str, Any]:
    return {"optimum": found.lowest, "reached": _finite(found.reached), "known_by": found.how}


def _limited(ledger: Ledger) -> str:
    """What a limit made of the search, where it left it no room."""
    spent = reporting.ended_by_limit(ledger)
    return "" if spent is None else spent.words


def _finite(value: float) -> float | None:
    """As JSON can say it."""
    return value if math.isfinite(value) else None


def _trace(ledger: str) -> tuple[tuple[int, float], ...]:
    """The lowest loss so far, whenever a question on the most tokens has lowered it, by token-forwards."""
    asked = [json.loads(line) for line in ledger.splitlines()]
    asked = [record for record in asked if record.get("kind") == "question"]
    most, spent, lowest, found = max((r["tokens"] for r in asked), default=0), 0, math.inf, list[tuple[int, float]]()
    for record in asked:
        spent += 0 if "shared" in record else record["tokens"] + record.get("training", 0)
        loss = record["loss"]
        if record["tokens"] == most and loss is not None and loss < lowest:
            lowest = loss
            found.append((spent, loss))
    return tuple(found)
