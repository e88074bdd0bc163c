"""A comparison: all cells on the same tokens, resumed to the same rows, faults on record, time spent on the better."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

import prunekit
from prunekit import WrongInput
from prunekit.calibration import fill
from prunekit.errors import PluginError
from prunekit.measure import speed
from prunekit.recipe.suite import Suite
from prunekit.report.comparison import COMPLETE, DENSE, FAILED, LEFT, REFUSED, Comparison, Row, Rows
from prunekit.run import compare, grid, pace, stages
from prunekit.run.bench import Bench
from prunekit.system.events import Events
from prunekit.system.progress import Progress, Stage

TIMES = {"seconds": 0.0, "wall": 0.0, "stages": {}, "passes": {}}


@pytest.fixture(scope="module")
def small(quick: Any, saved_tiny: Any) -> dict[str, Any]:
    """A small comparison, without its folder."""
    keys = {k: v for k, v in quick().items() if k.startswith("data__") or k == "quiet"}
    cells = {"greedy": {"allocator": {"name": "greedy", "steps": 1}, "objective": "divergence"}}
    return {
        "model": str(saved_tiny()),
        "recipe": "fast",
        "pruners": ["obs", "magnitude"],
        "allocators": ["uniform", "table"],
        "cells": cells,
        "sparsity": [0.25, 0.5],
        **keys,
    }


@pytest.fixture(scope="module")
def done(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """It, done."""
    return prunekit.compare(**small, output=tmp_path_factory.mktemp("done") / "comparison")


@pytest.fixture
def asked(small: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """It, to be done in a folder of the test's own."""
    return small | {"output": tmp_path / "comparison"}


FEW = {"sparsity": [0.5], "pruners": ["magnitude"], "allocators": ["uniform"], "cells": {}}


def timeless(rows: Any) -> list[Row]:
    return [replace(row, **TIMES) for row in rows]


def test_every_cell_has_its_row_on_the_same_windows_at_its_price(small: Any, done: Comparison) -> None:
    found, asked = done, small
    rows = [row for row in found.rows if row.cell != DENSE]
    names = {"uniform", "random", "greedy"} | {f"{p} + {a}" for p in ("obs", "magnitude") for a in ("uniform", "table")}
    assert {(row.cell, row.sparsity) for row in rows} == {(name, s) for name in names for s in (0.25, 0.5)}
    dense = found.dense(asked["model"])
    assert all(row.state == COMPLETE and row.removed >= row.sparsity for row in rows)
    assert {row.label for row in rows} == {dense.label}
    assert {len(row.losses) for row in rows} == {len(dense.losses)}
    twin = {row.cell: row for row in rows if row.sparsity == 0.5}
    assert twin["uniform"].recipe == twin["obs + uniform"].recipe  # run once
    assert twin["uniform"].losses == twin["obs + uniform"].losses
    assert twin["greedy"].trace
    losses = [loss for _, loss in twin["greedy"].trace]
    assert losses == sorted(losses, reverse=True)
    alone = prunekit.prune(
        asked["model"],
        recipe="fast",
        sparsity=0.5,
        **{k: v for k, v in asked.items() if k.startswith("data") or k == "quiet"},
    )
    assert alone.report["losses"]["pruned"]["perplexity"] == pytest.approx(twin["obs + table"].perplexity, rel=1e-6)


def test_what_is_said_of_the_rows(small: Any, done: Comparison) -> None:
    found, folder = done, done.output
    assert folder is not None
    assert found.places == [(small["model"], 0.25), (small["model"], 0.5)]
    standing = [each.standing for each in found.leaderboard(*found.places[1])]
    assert [each.loss for each in standing] == sorted(each.loss for each in standing)
    assert standing[0].tied
    table, summary = (folder / "leaderboard.md").read_text(), json.loads((folder / "summary.json").read_text())
    assert table == found.table()
    assert all(f"| {each.name} |" in table for each in standing)
    assert [cell["name"] for cell in summary["standings"][1]["cells"]] == [each.name for each in standing]
    assert summary["ranks"]["blocks"] == 2
    columns = pq.read_table(folder / "rows.parquet").to_pylist()
    assert [(row["cell"], row["perplexity"]) for row in columns] == [(row.cell, row.perplexity) for row in found.rows]


def test_a_comparison_that_was_killed_goes_on_to_the_same_rows(asked: Any, done: Comparison, monkeypatch: Any) -> None:
    make, made = Bench.make, []

    def killed(self: Any, parts: Any, name: str) -> Any:
        made.append(parts.digest)
        if len(made) == 4:
            raise KeyboardInterrupt
        return make(self, parts, name)

    monkeypatch.setattr(Bench, "make", killed)
    monkeypatch.setattr(grid, "OFTEN", 0)  # tables after every row
    with pytest.raises(KeyboardInterrupt):
        prunekit.compare(**asked)
    columns = pq.read_table(asked["output"] / "rows.parquet").to_pylist()
    assert [row["cell"] for row in columns] == [row.cell for row in done.rows][: 1 + 3 + 1]
    assert "| obs + uniform |" in (asked["output"] / "leaderboard.md").read_text()
    file = asked["output"] / "rows.jsonl"
    assert len(file.read_text().splitlines()) == 1 + 3 + 1  # the dense model, three that were made, and one the same
    with file.open("a") as half:
        half.write('{"model": "cut off')
    made.extend(range(9))
    found = prunekit.compare(**asked)
    assert timeless(found.rows) == timeless(done.rows)
    before = len(made)
    assert timeless(prunekit.compare(**asked).rows) == timeless(done.rows)
    assert len(made) == before  # nothing is run twice


def test_a_cell_that_cannot_be_or_breaks_is_on_record_and_the_rest_goes_on(asked: Any, monkeypatch: Any) -> None:
    make = Bench.make

    def breaking(self: Any, parts: Any, name: str) -> Any:
        if parts.recipe.pruner["name"] == "magnitude":
            raise RuntimeError("out of memory\nand more")
        return make(self, parts, name)

    monkeypatch.setattr(Bench, "make", breaking)
    cells = {"impossible": {"allocator": {"name": "milp", "limits": [["nonsense", 0.5]]}}}
    found = prunekit.compare(**asked | {"cells": cells, "sparsity": [0.5]})
    state = {row.cell: row for row in found.rows}
    assert state["magnitude + table"].state == FAILED
    assert state["magnitude + table"].reason == "RuntimeError: out of memory"
    assert state["impossible"].state == REFUSED
    assert state["obs + table"].state == COMPLETE
    assert "| impossible |" in found.table()
    assert {each.standing.name for each in found.leaderboard(*found.places[0])} == {
        "uniform",
        "random",
        "obs + uniform",
        "obs + table",
    }


ONE_PASS = FEW | {"recipe": "search", "rebuild": False, "allocators": ["schedule", "global-rank", "block-influence"]}


@pytest.fixture
def passes(monkeypatch: Any) -> list[list[str]]:
    """Signals of every calibration pass for a search that made candidates."""
    made, build = list[list[str]](), stages.build

    def counted(*args: Any, signals: Any, **keys: Any) -> Any:
        space, store = args[2], args[6]
        if any(site not in store for site in space.sites):
            made.append([type(signal).__name__ for signal in signals])
        return build(*args, signals=signals, **keys)

    monkeypatch.setattr(stages, "build", counted)
    return made


def test_cells_of_the_same_candidates_share_one_pass_and_come_out_as_alone(
    asked: Any, tmp_path: Path, passes: list[list[str]]
) -> None:
    found = prunekit.compare(**asked | ONE_PASS)
    # of both baselines, which have another pruner, of all that were asked, and of global-rank a second one
    assert passes == [[], [], ["Influence"], []]
    three = [row for row in found.rows if row.cell.startswith("magnitude")]
    names = {row.cell: set(row.passes) for row in three}
    assert names["magnitude + schedule"] == names["magnitude + block-influence"] != names["magnitude + global-rank"]
    shared = next(spent for row in three for spent in row.passes.values() if row.cell == "magnitude + schedule")
    first = next(row for row in three if row.cell == "magnitude + schedule")
    assert found.seconds(first) == pytest.approx(first.own + shared / 3)  # global-rank reads it too
    made = [row for row in found.rows if row.cell != DENSE]
    once = {(row.model, name): spent for row in made for name, spent in row.passes.items()}
    together = sum(row.own for row in made) + sum(once.values())
    assert sum(map(found.seconds, made)) == pytest.approx(together)
    assert together < sum(row.seconds for row in made)
    rows = {row.cell: replace(row, **TIMES) for row in found.rows}
    assert {row.state for row in rows.values()} == {COMPLETE}
    for name in ONE_PASS["allocators"]:
        alone = prunekit.compare(**asked | ONE_PASS | {"allocators": [name], "output": tmp_path / name})
        assert [replace(row, **TIMES) for row in alone.rows if row.cell == f"magnitude + {name}"] == [
            rows[f"magnitude + {name}"]
        ]


def test_what_breaks_while_it_is_measured_for_one_cell_breaks_no_other(
    asked: Any, passes: list[list[str]], monkeypatch: Any
) -> None:
    measured = fill.measured

    def breaking(signal: Any, *args: Any) -> float:
        if type(signal).__name__ == "Influence":
            raise PluginError("no influence today")
        return measured(signal, *args)

    monkeypatch.setattr(fill, "measured", breaking)
    found = prunekit.compare(**asked | ONE_PASS | {"allocators": ["schedule", "block-influence"]})
    states = {row.cell: row.state for row in found.rows}
    assert states.pop("magnitude + block-influence") == FAILED
    assert set(states.values()) == {COMPLETE}
    assert [len(signals) for signals in passes] == [0, 0, 1, 0, 1]  # together, and then each of the two for itself


def test_what_the_base_recipe_does_not_prune_is_compared_by_the_cells_that_do(asked: Any) -> None:
    alone = {"pruner": "magnitude", "allocator": "uniform", "objective": "expected-error"}
    few: Any = {**asked, **FEW, "recipe": "default", "structure": "weights", "pruners": [], "allocators": []}
    found = prunekit.compare(**few | {"cells": {"mine": alone}})
    states = {row.cell: (row.state, row.reason) for row in found.rows if row.cell != DENSE}
    assert states.pop("mine") == (COMPLETE, "")
    assert {name: state for name, (state, _) in states.items()} == {"uniform": REFUSED, "random": REFUSED}
    assert all("does not know structure weights" in reason for _, reason in states.values())
    with pytest.raises(WrongInput, match="'obs' does not know structure weights"):
        prunekit.compare(**few | {"cells": {"mine": {"pruner": "obs"}}, "output": asked["output"].with_name("none")})


def test_rows_of_other_weights_or_text_are_not_gone_on_with(asked: Any, saved_tiny: Any) -> None:
    asked |= FEW | {"model": str(saved_tiny())}
    prunekit.compare(**asked)
    weights = Path(asked["model"]) / "model.safetensors"
    weights.write_bytes((saved_tiny(hidden_act="gelu") / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(WrongInput, match="other weights or text"):
        prunekit.compare(**asked)
    with pytest.raises(WrongInput, match="another suite"):
        prunekit.compare(**asked | {"sparsity": [0.25]})
    assert prunekit.compare(**asked | {"sparsity": [0.25]}, overwrite=True).places == [(asked["model"], 0.25)]


def test_seeds_are_rows_of_their_own_on_the_same_text(asked: Any) -> None:
    asked |= FEW | {"seeds": 2}
    found = prunekit.compare(**asked)
    drawn = found.of(asked["model"], 0.5)["random"]
    assert [row.seed for row in drawn] == [0, 1]
    assert drawn[0].losses != drawn[1].losses
    assert len({row.label for row in found.rows}) == 1


def test_a_time_goes_to_the_better_cells_and_is_kept(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now, make, time = [0.0], Bench.make, 50

    @contextmanager
    def slow(self: Any, parts: Any, name: str) -> Any:
        """Eight seconds whatever the text, and two for all of it."""
        with make(self, parts, name) as made:
            now[0] += 8 + 2 * parts.recipe.data.calibration_tokens / 512
            yield made

    monkeypatch.setattr(Bench, "make", slow)
    monkeypatch.setattr(compare.clocks, "perf_counter", lambda: now[0])
    found = prunekit.compare(**asked | {"sparsity": [0.5]}, time=time)
    tried, final = ({row.cell for row in found.rows if (row.share, row.state) == (s, COMPLETE)} for s in (0.25, 1.0))
    left = {row.cell: row.reason for row in found.rows if row.state == LEFT}
    assert tried - {"uniform", "obs + uniform"} > set()
    assert final > {DENSE, "uniform"}
    assert now[0] <= time
    assert final | set(left) == {DENSE} | {cell.name for cell in found.suite.every_cell()}
    assert all("the time was spent" in reason or "others were better" in reason for reason in left.values())
    quarter, whole = (
        next(row for row in found.rows if (row.cell, row.share) == ("uniform", share)) for share in (0.25, 1)
    )
    assert quarter.losses != whole.losses  # on the search text
    assert found.places == [(asked["model"], 0.5)]


def test_a_cell_that_trains_is_tried_on_a_part_of_its_text_which_judges_no_trial(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judged.txt").write_text("\n".join(topics.values())[-20_000:], encoding="utf-8")
    read, make = list[tuple[int, int]](), Bench.make

    @contextmanager
    def watched(self: Any, parts: Any, name: str) -> Any:
        with make(self, parts, name) as made:
            if made.draws.recovery is not None:
                read.append((made.draws.calibration.n_tokens, made.draws.recovery.n_tokens))
            yield made

    monkeypatch.setattr(Bench, "make", watched)
    cells = {"trained": {"finishers": [{"name": "distillation", "epochs": 1, "batch_tokens": 64}]}}
    text = {"data__recovery_tokens": 256, "data__evaluation_dataset": str(tmp_path / "judged.txt")}
    found = prunekit.compare(**asked | FEW | text | {"cells": cells}, time="1h")
    assert {row.share for row in found.rows if row.cell == "trained" and row.state == COMPLETE} == {0.25, 1}
    assert read == [(128, 64), (512, 256)]


@pytest.mark.slow
def test_progress_is_one_over_all_models_and_steps_with_an_estimate(asked: Any, saved_tiny: Any) -> None:
    told, models = list[dict[str, Any]](), [str(saved_tiny()), str(saved_tiny())]
    progress = Events(lambda line: told.append(json.loads(line)), every=0)
    found = prunekit.compare(**asked | FEW | {"model": models}, time="1h", progress=progress)
    stages = [each for each in told if each["event"] == "progress"]
    mine = [each for each in stages if each["stage"] == "compare"]
    assert [each["state"] for each in mine].count("begun") == 1
    assert all(each["within"][:1] == ["compare"] for each in stages if each["stage"] != "compare")
    assert mine[-1]["done"] == mine[-1]["of"] == len(found.rows) == 2 * (1 + 3 * 2)
    running = [each for each in mine if each["state"] == "running"]
    assert [each["done"] for each in running] == list(range(1, len(found.rows) + 1))
    assert all(0 <= each["estimate"] <= 3600 for each in running)
    assert len({each["of"] for each in mine}) == 1
    assert Path(models[1]).name in running[-1]["note"]


def test_tables_are_written_as_often_as_that_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], list[float]()

    def write(*_: Any) -> None:
        now[0] += 1.0
        written.append(now[0])

    monkeypatch.setattr(compare.clocks, "perf_counter", lambda: now[0])
    monkeypatch.setattr(grid, "write_summary", write)
    rows = Rows(tmp_path / "rows")
    made = grid.Grid(Suite(recipes=("fast",)), rows, tmp_path, Stage(), models=1, each=100, end=None)
    for _ in range(100):
        now[0] += 2.0
        made.write_at_times()
    assert written[0] == 3  # with the first row
    assert sum(1.0 for _ in written) <= now[0] / grid.OFTEN + 1
    assert len(written) >= 200 / (grid.OFTEN + 4)


@pytest.mark.slow
def test_enough_time_is_no_halving(asked: Any, done: Comparison) -> None:
    timed = prunekit.compare(**asked, time="1h")
    finals = [
        sorted((row for row in timeless(each.rows) if row.share == 1), key=lambda r: r.key) for each in (done, timed)
    ]
    assert finals[0] == finals[1]
    assert not timed.without


def test_cells_are_timed_in_turns_with_the_dense_model_where_that_is_asked_for(asked: Any, monkeypatch: Any) -> None:
    """On a machine that takes a microsecond for every parameter and token."""
    lines = list[str]()

    def timed(model: Any, work: Any) -> tuple[int, int]:
        size = sum(p.numel() for p in model.parameters())
        return 1000 * size * work.batch * work.prompt, 1000 * size * work.batch * work.new_tokens

    class Said(Progress):
        def say(self, line: str) -> None:
            lines.append(line)

    monkeypatch.setattr(speed, "timed", timed)
    few = asked | FEW | {"progress": Said()}
    found = prunekit.compare(**few, speed=True)
    dense, *rows = found.rows
    assert dense.prefill_ratio is None
    assert dense.decode_tokens_per_second == pytest.approx(1e6 / dense.parameters)
    assert {row.timed for row in rows} == {dense.timed}
    for row in rows:
        times = dense.parameters / row.parameters
        assert times > 1
        for what in ("prefill", "decode"):
            ratio = row.pace(what)
            assert ratio is not None
            assert (ratio.median, ratio.low, ratio.high) == pytest.approx((times, times, times))
    assert found.rows == prunekit.compare(**few, speed=True).rows  # they come back as they are
    assert any(line.startswith("every cell is timed in turns") and line.endswith(" for 3") for line in lines)
    with pytest.raises(WrongInput, match="holds this comparison with speed, and small models are not kept"):
        prunekit.compare(**few)


def test_a_cell_that_cannot_be_timed_keeps_what_it_was_judged_to_be(monkeypatch: Any) -> None:
    def breaking(*_: Any) -> Any:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(pace.hf, "to_transformers", breaking)
    session: Any = SimpleNamespace(dense=SimpleNamespace(model=None, adapter=None), progress=Progress())
    small: Any = None
    found = pace.time_cell(session, small, Row("m", DENSE, 0.0, 0))
    assert found == {"timed": "not timed: RuntimeError: out of memory"}


def test_what_timing_takes_is_foreseen_of_the_dense_models_turns() -> None:
    of = Row("m", DENSE, 0.0, 0)
    assert pace.seconds_of(of) == 0
    few, some, many = (replace(of, wall=5.0 + rounds * turn, seconds=5.0, rounds=rounds)
                       for rounds, turn in ((15, 0.1), (15, 1.0), (3, 6.0)))  # fmt: skip
    assert pace.seconds_of(few) == pytest.approx(15 * 0.2)  # all rounds
    assert pace.seconds_of(some) == pytest.approx(15 + 2)  # until no further one begins
    assert pace.seconds_of(many) == pytest.approx(6 * 12)  # the fewest that make an interval


def test_zeros_are_not_timed_because_they_take_as_long(asked: Any) -> None:
    with pytest.raises(WrongInput, match=r"structure 2:4 leaves zeros, which take as long .* leave speed away"):
        prunekit.compare(**asked | FEW, structure="2:4", speed=True)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    row = Row("m", "c", 0.5, 0, losses=(1.0, None), trace=((3, 0.5),), stages={"prune": 1.0}, perplexity=None)  # type: ignore[arg-type]
    Rows(tmp_path / "rows").add(row)
    assert list(Rows(tmp_path / "rows")) == [row]


def test_answers_stand_beside_the_exact_optimum_of_the_table_that_they_searched(asked: Any) -> None:
    asked |= {"sparsity": [0.5], "pruners": ["obs"], "objectives": [{"name": "expected-error", "table": "errors"}]}
    asked |= {"cells": {}, "allocators": ["uniform", {"name": "random", "draws": 3, "compete": False}, "greedy"]}
    found = prunekit.compare(**asked)
    rows = {row.cell: row for row in found.rows}
    known = {name: row for name, row in rows.items() if row.optimum is not None}
    assert {row.known_by for row in known.values()} == {"table"}
    assert {name.split(" + ")[1].split("(")[0].strip() for name in known if " + " in name} == {"random", "greedy"}
    assert not [name for name in known if "uniform" in name]  # it has one allocation to choose from
    for row in known.values():
        assert row.reached is not None
        assert row.optimum is not None
        assert row.reached >= row.optimum > 0
    near = found.optima(*found.places[0])
    ratios = [known[cells[0]].reached / known[cells[0]].optimum for cells in near]  # type: ignore[operator]
    assert (ratios, len(near)) == (sorted(ratios), len(known))
    assert "### Distance to the exact optimum" in found.table()
    assert f"{ratios[-1] - 1:.2%}" == near[-1][3]
    assert found.as_dict()["standings"][0]["optima"]


def test_a_limit_that_probes_use_up_is_said_before_and_after(asked: Any) -> None:
    said, cells = list[str](), {"searched": {"allocator": {"name": "greedy", "table": "errors"}, "recipe": "search"}}

    class Heard(Progress):
        def say(self, line: str) -> None:
            said.append(line)

    asked |= FEW | {"cells": cells, "recipe": "search", "allocators": ["evolution", "nsga"], "search_budget": 2048}
    found = prunekit.compare(**asked | {"quiet": False}, progress=Heard())
    before = [line for line in said if line.startswith("warning: at 50% search_budget is spent")]
    assert len(before) == 1
    assert "by 2 of 5 cells" in before[0]
    assert "magnitude + evolution, magnitude + nsga" in before[0]
    assert {row.cell for row in found.rows if row.limited} == {"magnitude + evolution", "magnitude + nsga"}
    assert "Of 2 cells search_budget was spent for the most part on probes" in found.table()
    assert found.limited(asked["model"], 0.5) in found.table()
