"""The rows of a comparison, on file, and what can be said of them: standings with intervals, ranks, tables."""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from prunekit.measure.ratios import Ratio
from prunekit.recipe.suite import Suite
from prunekit.report.markup import table
from prunekit.report.statistics import Ranks, Standing, ranks, standings
from prunekit.report.words import number, said
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
    optimum: float | None = None  # least that the objective says of any allocation that could be the answer, if known
    reached: float | None = None  # what it says of the answer, on the same ladders
    known_by: str = ""  # table: by dynamic programming; all: every allocation was judged
    parameters: int = 0
    removed: float = 0.0  # share of the budget's metric that is gone
    token_forwards: int = 0
    questions: int = 0
    limited: str = ""  # what search_budget made of a search that it ended among its probes
    seconds: float = 0.0  # of the cell alone, passes included as when they were made
    stages: Mapping[str, float] = field(default_factory=dict)  # of these, by stage
    passes: Mapping[str, float] = field(default_factory=dict)  # of these, calibration passes by what makes them
    wall: float = 0.0  # that this run took for it
    trace: tuple[tuple[int, float], ...] = ()  # (token-forwards, lowest loss so far), on the most tokens
    prefill_tokens_per_second: float | None = None  # a median of rounds; None: it was not timed
    decode_tokens_per_second: float | None = None
    prefill_ratio: float | None = None  # how many times as fast as the dense model, in turns with it
    prefill_ratio_interval: tuple[float, ...] = ()  # holds it with 95 %
    decode_ratio: float | None = None
    decode_ratio_interval: tuple[float, ...] = ()
    rounds: int = 0  # in which it was timed
    workload: Mapping[str, int] = field(default_factory=dict)  # what was timed: batch, prompt, new_tokens
    timed: str = ""  # the same in words, and where; or why it was not

    @property
    def key(self) -> tuple[str, str, float, int, float]:
        """What no other row has."""
        return self.model, self.cell, self.sparsity, self.seed, self.share

    def pace(self, what: str) -> Ratio | None:
        """How many times as fast as the dense model, of one of `PACES`; None: it was not timed in turns with it."""
        median: float | None = getattr(self, f"{what}_ratio")
        return None if median is None else Ratio(median, *getattr(self, f"{what}_ratio_interval"))

    @property
    def own(self) -> float:
        """Seconds beside the calibration passes, which other cells may have in common with it."""
        return max(0.0, self.seconds - sum(self.passes.values()))


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
                row = row_of(json.loads(line))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise Damaged(f"{path} was changed since it was written; begin again with --overwrite") from error
            self._keep(row)
        if len(whole) != len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, row: Row) -> Row:
        """Write a row down, settled before anything goes on."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row), separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return self._keep(row)

    def _keep(self, row: Row) -> Row:
        """In the order of the file, also where it takes the place of one that was left out."""
        self.found.pop(row.key, None)
        self.found[row.key] = row
        return row

    def __iter__(self) -> Iterator[Row]:
        return iter(self.found.values())


def row_of(values: Mapping[str, Any]) -> Row:
    """Read a row that was written as JSON."""
    found = {**values, "losses": tuple(values["losses"]), "trace": tuple(map(tuple, values["trace"]))}
    found |= {key: tuple(values[key]) for key in ("prefill_ratio_interval", "decode_ratio_interval") if key in values}
    return Row(**found)


HEADS = (
    "", "cell", "perplexity", "log ratio to the best", f"to {REFERENCE}", "removed", "token-forwards", "s", "seeds",
)  # fmt: skip

PACES = ("prefill", "decode")  # reading prompts in one pass, making tokens one by one
PACED = ("prefill, × dense", "decode, × dense")  # further columns where cells were timed
PACED_TEXT = (
    "× dense is how many times as many tokens per second as of the dense model, timed in turns with it, with a 95 % "
    "interval of the sign test over rounds; of several seeds the median, and an interval that holds all of theirs. "
    "Prefill reads prompts in one pass, decode makes tokens one by one from the cache."
)

WITHOUT = ("cell", "model", "removed", "seed", "state", "reason")


OPTIMA = ("cell", "predicted loss of the answer", "exact optimum", "above it", "known by", "seeds")
OPTIMA_TEXT = (
    "Predicted loss, not perplexity: what the objective says of the answer of a search, and the exact optimum of the "
    "same objective over the ladders of that search, at the same budget; by dynamic programming over its table, or by "
    "judging every allocation. Means over seeds. Of cells that are not here the optimum is not known."
)
SECONDS = "Seconds: a cell's own, and an equal share of calibration passes that cells have in common."
LIMITED = 8  # cells that a sentence names
HOW = {"table": "dynamic programming", "all": "all judged"}


@dataclass(frozen=True)
class Entry:
    """A line of a leaderboard."""

    standing: Standing
    rows: Sequence[Row]  # one per seed
    place: int  # from 1
    seconds: float  # mean over seeds: its own, and its share of the calibration passes that others read too

    @property
    def perplexity(self) -> float:
        """Of the mean loss; inf where that is not finite."""
        return _exp(self.standing.loss)

    def pace(self, what: str) -> Ratio | None:
        """How many times as fast as the dense model, of one of `PACES`, over seeds; None: a seed was not timed."""
        found = [row.pace(what) for row in self.rows]
        known = [ratio for ratio in found if ratio is not None]
        return Ratio.together(known) if len(known) == len(found) else None

    @property
    def paces(self) -> tuple[str, ...]:
        """What `PACED` says, as it is printed."""
        return tuple("not timed" if (found := self.pace(what)) is None else str(found) for what in PACES)

    @property
    def cells(self) -> tuple[str, ...]:
        """What `HEADS` says, as it is printed."""
        found, n = self.standing, len(self.rows)
        half = (_exp(found.loss + found.spread) - _exp(found.loss - found.spread)) / 2
        other = found.above_reference
        return (
            "=" if found.tied and self.place > 1 else str(self.place),
            found.name,
            number(self.perplexity) + (f" ± {half:.2f}" if n > 1 and math.isfinite(half) else ""),
            "" if self.place == 1 else said(found.above_best),
            "" if other is None or found.name == REFERENCE else said(other),
            f"{min(row.removed for row in self.rows):.2%}",
            f"{sum(row.token_forwards for row in self.rows) // n:,}",
            f"{self.seconds:,.1f}",
            str(n),
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """The rows of a suite, and what can be said of them."""

    suite: Suite
    rows: Sequence[Row]
    output: Path | None = None
    _boards: dict[tuple[str, float], list[Entry]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def places(self) -> list[tuple[str, float]]:
        """(model, sparsity) pairs that have final rows, in order."""
        found = dict.fromkeys((row.model, row.sparsity) for row in self._final if row.cell != DENSE)
        models = list(dict.fromkeys(model for model, _ in found))
        order = {sparsity: i for i, sparsity in enumerate(self.suite.sparsity)}  # rows may come in another one
        return sorted(found, key=lambda place: (models.index(place[0]), order.get(place[1], len(order))))

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

    def leaderboard(self, model: str, sparsity: float) -> list[Entry]:
        """The cells on one model at one sparsity, the best first, and which differences are within noise."""
        if (model, sparsity) not in self._boards:  # intervals take a second each
            self._boards[model, sparsity] = self._ordered(self.of(model, sparsity))
        return self._boards[model, sparsity]

    def board(self, model: str, sparsity: float) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The heads and the rows of that leaderboard, with how fast cells are where any of the comparison was timed."""
        entries = self.leaderboard(model, sparsity)
        if not self.is_timed:
            return HEADS, [each.cells for each in entries]
        return (*HEADS, *PACED), [(*each.cells, *each.paces) for each in entries]

    @property
    def is_timed(self) -> bool:
        """Whether it is known of any cell how fast it is."""
        return any(row.prefill_ratio is not None for row in self._final)

    def timing(self, model: str, sparsity: float) -> str:
        """Sentences on how cells were timed, and which were not; empty where none of the comparison was."""
        if not self.is_timed:
            return ""
        rows = [row for rows in self.of(model, sparsity).values() for row in rows]
        how = "; ".join(dict.fromkeys(row.timed for row in rows if row.prefill_ratio is not None))
        why = {row.cell: row.timed for row in rows if row.prefill_ratio is None}
        text = f"Timed at {sparsity:.0%} removed: {how}." if how else f"No cell was timed at {sparsity:.0%}."
        some = "; ".join(f"{cell} ({reason})" if reason else cell for cell, reason in list(why.items())[:LIMITED])
        more = f" and {len(why) - LIMITED} more" if len(why) > LIMITED else ""
        return text + (f" Not timed: {some}{more}." if why and how else "")

    def words_of_dense(self, model: str) -> str:
        """The dense model in a sentence: perplexity, of what, and how fast where it was timed."""
        row = self.dense(model)
        read, made = row.prefill_tokens_per_second, row.decode_tokens_per_second
        pace = "" if read is None or made is None else f"; {read:,.0f} tokens/s of prefill, {made:,.1f} of decode"
        return f"Dense: {number(row.perplexity)} ({row.label}){pace}."

    def _ordered(self, found: Mapping[str, Sequence[Row]]) -> list[Entry]:
        losses = {
            cell: np.array([[math.inf if x is None else x for x in row.losses] for row in rows])
            for cell, rows in found.items()
        }
        order = standings(losses, REFERENCE) if losses else []
        entries = []
        for place, each in enumerate(order, start=1):
            rows = found[each.name]
            entries.append(Entry(each, rows, place, sum(map(self.seconds, rows)) / len(rows)))
        return entries

    def seconds(self, row: Row) -> float:
        """What a row has taken: its own seconds, and an equal share of every calibration pass that rows have in common.

        So the seconds of all rows add up to what it took one worker to make them; a pass that several workers have
        made counts once.
        """
        return row.own + sum(spent / self._readers[row.model, name] for name, spent in row.passes.items())

    @cached_property
    def _readers(self) -> Counter[tuple[str, str]]:
        """How many rows read a calibration pass, by model and pass."""
        return Counter((row.model, name) for row in self.rows for name in row.passes)

    def optima(self, model: str, sparsity: float) -> list[tuple[str, ...]]:
        """What `OPTIMA` says of cells whose exact optimum is known, the nearest to it first."""
        found = list[tuple[float, tuple[str, ...]]]()
        for cell, rows in self.of(model, sparsity).items():
            pairs = [(row.reached, row.optimum) for row in rows if row.optimum is not None and row.reached is not None]
            if not pairs:
                continue
            above = sum(_above(*pair) for pair in pairs) / len(pairs)
            reached, optimum = (f"{sum(values) / len(pairs):.6g}" for values in zip(*pairs, strict=True))
            by = ", ".join(sorted({HOW.get(row.known_by, row.known_by) for row in rows if row.known_by}))
            shown = f"{above:.2%}" if math.isfinite(above) else "the optimum is 0"
            found.append((above, (cell, reached, optimum, shown, by, str(len(pairs)))))
        return [cells for _, cells in sorted(found)]

    def limited(self, model: str, sparsity: float) -> str:
        """A sentence on the searches that their limit ended among their probes; empty where there are none."""
        names = [cell for cell, rows in self.of(model, sparsity).items() if any(row.limited for row in rows)]
        if not names:
            return ""
        some = ", ".join(names[:LIMITED]) + (f" and {len(names) - LIMITED} more" if len(names) > LIMITED else "")
        return (
            f"Of {len(names)} cells search_budget was spent for the most part on probes, so that their answers are the "
            f"best of a table of probes or near it and the searches are hardly compared: {some}."
        )

    def ranks(self) -> Ranks | None:
        """Mean ranks over models and sparsities, of what every cell has on average over its seeds.

        Seeds are no blocks: they repeat a method on the same windows, and would count one result several times.
        """
        blocks: dict[tuple[str, float], dict[str, list[float]]] = {}
        for row in self._final:
            if row.cell != DENSE:
                loss = math.inf if row.perplexity is None else math.log(row.perplexity)
                blocks.setdefault((row.model, row.sparsity), {}).setdefault(row.cell, []).append(loss)
        return ranks([{cell: fmean(some) for cell, some in block.items()} for block in blocks.values()])

    @property
    def without(self) -> list[Row]:
        """Rows of cells that have no result, and why."""
        return [row for row in self.rows if row.state != COMPLETE]

    def _repr_html_(self) -> str:
        boards = [
            table(f"{model}, {sparsity:.0%} removed", *self.board(model, sparsity)) for model, sparsity in self.places
        ]
        return "".join(boards) + (table("Cells without a result", WITHOUT, self.missing) if self.without else "")

    @property
    def missing(self) -> list[tuple[str, ...]]:
        """What `WITHOUT` says of cells that have no result."""
        return [(r.cell, r.model, f"{r.sparsity:.0%}", str(r.seed), r.state, r.reason) for r in self.without]

    def table(self) -> str:
        """All of it as Markdown."""
        lines = []
        for model, sparsity in self.places:
            lines += [
                f"## {model}, {sparsity:.0%} removed",
                "",
                f"{self.words_of_dense(model)} Intervals hold the difference with 95 %, over windows and seeds; = is "
                f"not separated from the best. {SECONDS}",
                "",
                *_markdown(*self.board(model, sparsity)),
            ]
            lines.append("")
            if timing := self.timing(model, sparsity):
                lines += [f"{PACED_TEXT} {timing}", ""]
            if limited := self.limited(model, sparsity):
                lines += [limited, ""]
            if near := self.optima(model, sparsity):
                lines += ["### Distance to the exact optimum", "", OPTIMA_TEXT, "", *_markdown(OPTIMA, near), ""]
        if (ranked := self.ranks()) is not None:
            lines += [f"## Mean ranks over {ranked.blocks} blocks", ""]
            lines.append(
                "A block is a model at a sparsity; seeds are averaged first. Friedman's p that all are alike: "
                f"{ranked.p:.3g}. Ranks that differ by less than {ranked.critical:.2f} are not separated (Nemenyi, "
                "95 %)."
            )
            order = sorted(ranked.mean.items(), key=lambda x: x[1])
            lines += ["", *_markdown(("cell", "mean rank"), [(name, f"{rank:.2f}") for name, rank in order]), ""]
        if self.without:
            lines += ["## Without a result", "", *_markdown(WITHOUT, self.missing), ""]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For programs: every standing with its intervals, ranks, and what has no result."""
        ranked = self.ranks()
        return {
            "schema": 1,
            "suite": self.suite.model_dump(mode="json"),
            "standings": [
                {"model": model, "sparsity": sparsity, "dense": self.dense(model).perplexity,
                 **_dense_speed(self.dense(model)),
                 "cells": [
                     _plain(asdict(each.standing)) | _speed(each) for each in self.leaderboard(model, sparsity)
                 ],
                 "optima": [
                     {"cell": row.cell, "seed": row.seed, "reached": row.reached, "optimum": row.optimum,
                      "by": row.known_by}
                     for rows in self.of(model, sparsity).values() for row in rows if row.optimum is not None
                 ]}
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

    table = pa.Table.from_pylist(
        [
            asdict(row) | {key: json.dumps(dict(getattr(row, key))) for key in ("stages", "passes", "workload")}
            for row in rows
        ]
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())


def _speed(entry: Entry) -> dict[str, Any]:
    """For programs, as `prunekit evaluate --json` says it: how many times as fast as the dense model a cell is."""
    found = dict[str, Any]()
    for what in PACES:
        if (ratio := entry.pace(what)) is not None:
            found |= {f"{what}_ratio": ratio.median, f"{what}_ratio_interval": [ratio.low, ratio.high],
                      f"{what}_ratio_clear": ratio.clear}  # fmt: skip
    return found


def _dense_speed(row: Row) -> dict[str, Any]:
    """The same of a dense model, in tokens per second."""
    if row.prefill_tokens_per_second is None:
        return {}
    return {
        "dense_speed": {
            "prefill_tokens_per_second": row.prefill_tokens_per_second,
            "decode_tokens_per_second": row.decode_tokens_per_second,
            "workload": dict(row.workload), "timed": row.timed,
        }
    }  # fmt: skip


def _above(reached: float, optimum: float) -> float:
    """By how much, as a share of the optimum."""
    if reached == optimum:
        return 0.0
    return (reached - optimum) / abs(optimum) if optimum else math.inf


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if not math.isnan(loss) else math.nan


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; a bar in a name ends no cell, and a line break no row."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def _plain(value: Any) -> Any:
    """As JSON can say it: what is not finite is null."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
