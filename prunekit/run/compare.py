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
from typing import Any

from prunekit.data.tokens import TokenBatch
from prunekit.data.windows import whole_windows
from prunekit.errors import WrongInput, first_line
from prunekit.measure.perplexity import Perplexity, perplexity
from prunekit.plugins.registry import identify_code
from prunekit.recipe.resolve import Parts, resolve
from prunekit.recipe.schema import Recipe
from prunekit.recipe.suite import Cell, Suite
from prunekit.report import document as reporting
from prunekit.report.comparison import (
    COMPLETE,
    DENSE,
    FAILED,
    REFUSED,
    ROWS,
    Comparison,
    Row,
    Rows,
)
from prunekit.run.bench import Bench, Made
from prunekit.run.beside import check_workers, make_beside, share_out
from prunekit.run.grid import Column, Grid, Key
from prunekit.run.halving import SHARES, WHOLE, Alone
from prunekit.run.pace import announcement, check_speed, identity_of, seconds_of, time_cell, time_dense
from prunekit.run.session import MORE, Job, open_session
from prunekit.run.workplace import claimed
from prunekit.search.exact import Optimum
from prunekit.search.ledger import Ledger

# of a row, for programs
TOLD = ("perplexity", "objective", "optimum", "reached", "parameters", "removed", "token_forwards", "seconds",
        "prefill_ratio", "decode_ratio")  # fmt: skip
FEW = 8  # cells that a line names
LEAST = 8  # windows that a cell is judged on where it is tried on a part of the text


def compare(suite: Suite, job: Job, *, time: float | None = None, disk: int = 20 << 30, workers: int = 1) -> Comparison:
    """Run all cells of a suite that have no row yet, and say what can be said of them.

    Args:
        suite: what is compared, on which models.
        job: the folder of the comparison, and whether an earlier one is continued or replaced; or a model in memory.
        time: seconds to spend; then cells are tried on a quarter of the text, the better ones on half, and the best of
            these on all of it, as many as there is time for; nothing is begun that would not be done in time. Where the
            first step takes more than its third of the time, the second is left out. None: all cells on all of it, as
            long as it takes.
        disk: bytes of candidates to keep for cells to come.
        workers: processes that make cells side by side, each with the model open and its share of the machine.

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
    check_workers(workers, suite, base, job)
    versions = {name: metadata.version(name) for name in ("prunekit", "torch", "transformers")}
    identity: dict[str, Any] = {"suite": identity_of(suite), "models": models, "versions": versions}
    identity |= identify_code([cell.recipe.model_dump(mode="json") for cell in cells])
    with claimed(output, identity, "a comparison", resume=job.resume, overwrite=job.overwrite) as place:
        rows = Rows(place / ROWS)
        job.progress.describe({"suite": suite.model_dump(mode="json"), "models": models})
        end = None if time is None else began + time - sum(row.wall for row in rows) / workers
        each = len(suite.sparsity) * len(cells) * (suite.seeds + (time is not None)) + 1
        with job.progress.stage("compare", len(models) * each) as stage:
            grid = Grid(suite, rows, place, stage, len(models), each, end, workers)
            for i, model in enumerate(models):
                over = base if job.model is not None else base.with_overrides({"model": model})
                over = _to_open_with(over, cells, suite.sparsity[0])
                until, parts, folder = grid.begin_model(), resolve(over), place / f"model-{i}"
                column = Column(grid, model, [cell.name for cell in cells])
                if (order := share_out(column, cells, over, folder, workers, disk, until)) is not None:
                    make_beside(order, job.progress)
                else:
                    with open_bench(parts, job, folder, disk) as bench:
                        Work(bench, suite, cells, model, rows, grid, until).run()
                grid.write()
        return Comparison(suite, list(rows), place)


def _to_open_with(base: Recipe, cells: Sequence[Cell], sparsity: float) -> Recipe:
    """The base recipe or, where its plug-ins do not know what is removed, that of the first cell whose plug-ins do.

    Raises:
        WrongInput: there is no such cell; says what is wrong with the base recipe.
    """
    try:
        resolve(base)
    except WrongInput:
        for cell in cells:
            with suppress(WrongInput):
                return resolve(cell.under(base, sparsity, base.seed)).recipe
        raise
    return base


@contextmanager
def open_bench(parts: Parts, job: Job, folder: Path, disk: int, priced: Path | None = None) -> Iterator[Bench]:
    """Open a model.

    Args:
        parts: of the base recipe.
        job: of the comparison.
        folder: of its own for what cells share.
        disk: bytes of calibration passes that are kept there.
        priced: folder in which an earlier run may have left the prices of a measured metric; None: that one.
    """
    folder.mkdir(exist_ok=True)
    session = open_session(parts, replace(job, output=folder))
    if session.draws.search.answers is not None:
        raise WrongInput("questions have no perplexity to compare; give a text as data.search_dataset")
    session = session.with_prices(priced or folder)
    session.make_spaces()  # can the budget be met, at these prices?
    with session.work_in(nullcontext(folder)) as (session, place):
        yield Bench(session, place, disk, exact=True)


@dataclass
class Work:
    """The cells of a suite on one model."""

    bench: Bench
    suite: Suite
    cells: Sequence[Cell]
    model: str
    rows: Rows
    grid: Grid
    until: float | None  # what the clock says when all has to be done; None: it takes as long as it takes

    @property
    def column(self) -> Column:
        """Its rows."""
        return Column(self.grid, self.model, [cell.name for cell in self.cells])

    def run(self) -> None:
        """Make all rows that are not there yet."""
        dense = self.dense()
        for share in SHARES if self.until is not None else (WHOLE,):
            self.announce(share)
        self.warn_of_limit()
        if self.suite.speed:
            many = len(self.suite.sparsity) * len(self.cells) * self.suite.seeds
            self.bench.session.progress.say(announcement(dense, many))
        self.column.count(dense)
        if self.until is None:
            self._all()
        else:
            self._in_time(self.until, dense)

    def _all(self) -> None:
        """Every cell on all of the text."""
        coming = self.column.whole
        for i, key in enumerate(coming):
            self.grid.expect(len(coming) - i, self.column.foreseen(coming[i:]))
            self._row(*key)

    def _in_time(self, until: float, dense: Row) -> None:
        """The better cells on all of the text, as many as there is time for."""
        evaluation = dense.seconds + seconds_of(dense)
        self.column.halve(Alone(self._row), until, evaluation, self.bench.session.progress.say)

    def dense(self) -> Row:
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

    def announce(self, share: float) -> dict[Key, tuple[str, str | None]]:
        """Tell the bench which cells come on so much of the text; what cannot be resolved is refused in its turn.

        Returns:
            Of every row that can be resolved the digest of its recipe, and the name of the calibration pass that it
            shares with others.
        """
        found = dict[Key, tuple[str, str | None]]()
        for sparsity in self.suite.sparsity:
            for seed in range(self.suite.seeds if share == 1 else 1):
                for cell in self.cells:
                    with suppress(WrongInput, RuntimeError):
                        parts = self._parts(cell, Row(self.model, cell.name, sparsity, seed, share))
                        found[cell.name, sparsity, seed, share] = parts.digest, self.bench.announce(parts)
        return found

    def warn_of_limit(self) -> None:
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

    def _row(self, cell: str, sparsity: float, seed: int, share: float) -> Row:
        """The row of a cell: that on file, that of the same recipe under another name, or a new one."""
        key = (cell, sparsity, seed, share)
        return self.column.count(self.column.find(key) or self.column.keep(self.make(key)))

    def make(self, key: Key) -> Row:
        """Make a row, of what cannot be or breaks too."""
        begun, cell = clocks.perf_counter(), next(cell for cell in self.cells if cell.name == key[0])
        blank = Row(self.model, *key)
        try:
            made = self._tried(cell, blank)
        except WrongInput as error:
            made = replace(blank, state=REFUSED, reason=first_line(error))
        except (RuntimeError, ArithmeticError, MemoryError) as error:  # broken promises, memory, factorisations
            made = replace(blank, state=FAILED, reason=f"{type(error).__name__}: {first_line(error)}")
        return replace(made, wall=clocks.perf_counter() - begun)

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
