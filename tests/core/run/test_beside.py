"""Cells that several processes make side by side: who makes which, one that dies, and none is left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import prunekit
from prunekit import Recipe, WrongInput
from prunekit.demo import MODEL
from prunekit.errors import CannotGoOn
from prunekit.recipe.suite import Cell, Suite
from prunekit.report.comparison import COMPLETE, DENSE, FAILED, ROWS, Row, Rows
from prunekit.run.beside import Order, make_beside
from prunekit.run.crew import Crew, Ended
from prunekit.run.dealing import Deal, Share, Task, find_twin, share_devices, without_twins
from prunekit.run.grid import Column, Grid
from prunekit.run.together import Measures, same_candidates
from prunekit.run.workplace import claimed
from prunekit.system.progress import Progress, Stage

PRETENDED = (sys.executable, "-S", "-E", str(Path(__file__).with_name("pretended_worker.py")))


class Heard(Progress):
    """All that is told, a part by its name."""

    def __init__(self, name: str = "", told: list[tuple[str, Any]] | None = None) -> None:
        self.name, self.told = name, [] if told is None else told

    def say(self, line: str) -> None:
        self.told.append(("say", line))

    def describe(self, settings: Mapping[str, Any]) -> None:
        self.told.append((f"describe {self.name}", settings))

    def measured(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.told.append((f"measured {self.name}", (values, step)))

    @contextmanager
    def part(self, name: str) -> Iterator[Progress]:
        done = False
        try:
            yield Heard(name, self.told)
            done = True
        finally:
            self.told.append((f"end {name}", done))

    def of(self, what: str) -> list[Any]:
        return [value for key, value in self.told if key == what]

    @property
    def workers(self) -> dict[str, Mapping[str, Any]]:
        """By cell, what who has made it has told."""
        told = {key.removeprefix("describe "): value for key, value in self.told if key.startswith("describe ")}
        return {cell: value for cell, value in told.items() if cell}


class Counted(Stage):
    def __init__(self) -> None:
        self.done, self.expected = 0, list[tuple[int, float | None]]()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps

    def expect(self, total: int, seconds: float | None) -> None:
        self.expected.append((total, seconds))


def order(
    place: Path, cells: Sequence[str], workers: int = 2, model: str = "m", until: float | None = None, **suite: Any
) -> Order:
    """That pretended workers make these cells in a folder."""
    place.mkdir(exist_ok=True)
    recipe = Recipe.load("fast")
    grid = Grid(Suite(recipes=("fast",), **suite), Rows(place / ROWS), place, Counted(), 0, 0, None, workers)
    column = Column(grid, model, list(cells))
    shares, every = [Share("cpu", workers)] * workers, [Cell(name, recipe) for name in cells]
    return Order(column, every, recipe, place / "model-0", shares, 3, 1 << 20, until, workers)


def rows_of(place: Path) -> dict[str, Row]:
    return {row.cell: row for row in Rows(place / ROWS) if row.cell != DENSE}


# -- who makes which ------------------------------------------------------------------------------------


class Shop:
    """Workers that only pretend to work, and a clock that only they move."""

    def __init__(self, tasks: Sequence[Task], workers: int, passes: float, rest: float) -> None:
        self.deal, self.waiting, self.passes, self.rest = Deal(), list(tasks), passes, rest
        self.busy, self.ends = dict[int, Task](), dict[int, float]()
        self.made, self.now, self.has = list[tuple[int, Task]](), 0.0, set[tuple[int, str | None]]()
        while self.waiting or self.busy:
            for worker in sorted({*range(workers)} - self.busy.keys()):
                if (task := self.deal.take(worker, without_twins(self.waiting, self.busy))) is not None:
                    self.begin(worker, task)
            assert self.busy, "everybody waits"
            worker = min(self.ends, key=self.ends.__getitem__)
            self.now, task = self.ends.pop(worker), self.busy.pop(worker)
            row = Row("m", *task.key, recipe=task.recipe or "", seconds=passes + rest, passes={"": passes})
            self.deal.learn(task, row)
            self.made.append((worker, task))
            self.waiting = [task for task in self.waiting if find_twin(task, [row]) is None]

    def begin(self, worker: int, task: Task) -> None:
        self.waiting.remove(task)
        new = task.reads is None or (worker, task.reads) not in self.has
        self.has.add((worker, task.reads))
        self.busy[worker], self.ends[worker] = task, self.now + self.rest + self.passes * new

    @property
    def times(self) -> Counter[str]:
        """How many workers have made every pass."""
        return Counter(reads for _, reads in self.has if reads is not None)


def tasks(passes: Sequence[int]) -> list[Task]:
    """So many cells of every pass, dealt like cards, as those of a grid are."""
    cards = [(k, i) for i, count in enumerate(passes) for k in range(count)]
    return [Task((f"cell {i} {k}", 0.5, 0, 1.0), f"recipe {i} {k}", f"pass {i}") for k, i in sorted(cards)]


def test_cells_of_one_pass_are_made_where_it_is() -> None:
    shop = Shop(tasks([3, 3, 3, 3]), workers=2, passes=10.0, rest=1.0)
    assert set(shop.times.values()) == {1}
    assert shop.now == 2 * (10 + 3)
    owners = {task.reads: {worker for worker, other in shop.made if other.reads == task.reads} for _, task in shop.made}
    assert all(len(workers) == 1 for workers in owners.values())


def test_a_pass_is_made_again_where_that_is_sooner() -> None:
    assert Shop(tasks([9]), workers=2, passes=2.0, rest=1.0).now < 2 + 9
    assert Shop(tasks([9]), workers=2, passes=2.0, rest=1.0).times == {"pass 0": 2}
    cheap, dear = Shop(tasks([4, 1]), 2, 1.0, 5.0), Shop(tasks([4, 1]), 2, 50.0, 1.0)
    assert cheap.times["pass 0"] == 2
    assert dear.times["pass 0"] == 1
    assert dear.now == 50 + 4


@pytest.mark.parametrize("seed", range(20))
def test_every_cell_is_made_once_no_later_than_by_one_worker(seed: int) -> None:
    rng = random.Random(seed)
    every = tasks([rng.randint(1, 6) for _ in range(rng.randint(1, 5))])
    every += [Task((f"twin {i}", 0.5, 0, 1.0), task.recipe, task.reads) for i, task in enumerate(every[::3])]
    every += [Task((f"alone {i}", 0.5, 0, 1.0)) for i in range(rng.randint(0, 3))]
    rng.shuffle(every)
    workers, passes, rest = rng.randint(1, 5), rng.choice([0.0, 1.0, 20.0]), rng.uniform(0.5, 3)
    shop, one = Shop(every, workers, passes, rest), Shop(every, 1, passes, rest)
    made = [task.recipe or task.key[0] for _, task in shop.made]
    assert len(made) == len(set(made))
    assert set(made) == {task.recipe or task.key[0] for task in every}
    assert shop.now <= one.now
    assert set(one.times.values()) <= {1}


def test_seeds_share_a_pass_in_which_nothing_is_drawn() -> None:
    names = [json.dumps({"seed": seed, "width": None, "data": {"shuffle": False}}) for seed in (0, 1)]
    assert len({same_candidates(name, Measures(scores=True)) for name in names}) == 1
    assert len({same_candidates(name, Measures(nats=True)) for name in names}) == 2
    assert len({same_candidates(name.replace("false", "true"), Measures()) for name in names}) == 2


def test_a_recipe_is_told_to_a_worker_with_who_has_said_what(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("sparsity: 0.1\nengine: {name: ray, address: ray://elsewhere:1}\nmodel: m\n")
    recipe = Recipe.load(file).with_overrides({"data.dataset": ["a.txt", "b.txt"]})
    told = Recipe.of_told(json.loads(json.dumps(recipe.as_told())))
    assert told == recipe
    assert told.from_file == recipe.from_file == {"engine.address"}


def test_devices_are_divided_among_workers() -> None:
    cuda = [f"cuda:{i}" for i in range(4)]
    assert share_devices(["cpu"], 3, named="auto") == [Share("cpu", 3)] * 3
    assert share_devices(cuda, 4, named="cuda") == [Share(name, 1) for name in cuda]
    assert [share.device for share in share_devices(cuda, 2, named="cuda")] == ["cuda:0,cuda:1", "cuda:2,cuda:3"]
    assert [share.device for share in share_devices(cuda, 3, named="cuda")] == ["cuda:0", "cuda:1,cuda:2", "cuda:3"]
    assert share_devices(["cuda:1"] * 2, 2, named="cuda:1,cuda:1") == [Share("cuda:1", 2)] * 2
    assert share_devices(["cpu:0", "cpu:1"], 2, named="cpu:0,cpu:1") == [Share("cpu:0", 2), Share("cpu:1", 2)]
    with pytest.raises(WrongInput, match=r"4 workers were asked.*2 devices \(cuda:0, cuda:1\).*--device cuda:0,cuda:0"):
        share_devices(cuda[:2], 4, named="cuda:0,cuda:1")


# -- processes that make nothing -----------------------------------------------------------------------


def test_rows_are_those_of_all_cells_and_one_recipe_is_run_once(tmp_path: Path) -> None:
    cells = ["a p r", "b p s", "c q t", "same p r", "d q u"]
    asked, heard = order(tmp_path, cells, model="with 1", sparsity=(0.3, 0.5)), Heard()
    make_beside(asked, heard, PRETENDED)
    rows = list(Rows(tmp_path / ROWS))
    assert {row.key for row in rows} == {("with 1", DENSE, 0.0, 0, 1.0)} | {
        ("with 1", cell, sparsity, 0, 1.0) for cell in cells for sparsity in (0.3, 0.5)
    }
    assert {row.state for row in rows} == {COMPLETE}
    made = heard.workers
    assert set(made) == {"a p r", "b p s", "c q t", "d q u"}
    assert {told["worker"] for told in made.values()} == {0, 1}
    assert {told["threads"] for told in made.values()} == {"3"}
    assert all(heard.of(f"measured {cell}") == [({"loss": 1.0}, 8)] * 2 for cell in made)
    assert all(heard.of(f"end {cell}") == [True, True] for cell in made)
    assert len(heard.of("say")) == 2  # of what there is, and once what all of them say
    assert "2 workers side by side" in heard.of("say")[0]
    stage = asked.column.grid.stage
    assert isinstance(stage, Counted)
    assert stage.done == len(rows)
    assert {total for total, _ in stage.expected} == {len(rows)}
    again = Heard()
    make_beside(order(tmp_path, cells, model="with 1", sparsity=(0.3, 0.5)), again, PRETENDED)
    assert not again.workers
    assert list(Rows(tmp_path / ROWS)) == rows


def test_one_that_dies_takes_no_other_cell_with_it(tmp_path: Path) -> None:
    cells = ["a p r", "b p s dies", "c q t", "d q u dies", "e p v", "f q w"]
    asked, heard = order(tmp_path, cells), Heard()
    make_beside(asked, heard, PRETENDED)
    rows = rows_of(tmp_path)
    assert {cell for cell, row in rows.items() if row.state == FAILED} == {"b p s dies", "d q u dies"}
    assert {cell for cell, row in rows.items() if row.state == COMPLETE} == {"a p r", "c q t", "e p v", "f q w"}
    assert "ended by SIGKILL, as the system does where memory is short" in rows["b p s dies"].reason
    assert "model-0/worker-" in rows["b p s dies"].reason
    assert heard.of("end b p s dies") == [False]
    assert rows["b p s dies"].wall > 0


@pytest.mark.parametrize(
    ("model", "why"), [("no 1", "ended with code 1: it does not fit"), ("refused by 1", "there is no text in it")]
)
def test_one_that_cannot_open_the_model_is_left_out(tmp_path: Path, model: str, why: str) -> None:
    heard = Heard()
    make_beside(order(tmp_path, ["a p r", "b q s", "c t u"], model=model), heard, PRETENDED)
    assert {row.state for row in rows_of(tmp_path).values()} == {COMPLETE}
    (warning,) = [line for line in heard.of("say") if line.startswith("warning")]
    assert "worker 1 is left out" in warning
    assert why in warning


def test_where_the_first_cannot_open_the_model_nobody_can(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(CannotGoOn, match=r"could not be opened by a worker: .*it does not fit"):
        make_beside(order(tmp_path / "died", ["a p r", "b q s"], model="no 0"), heard, PRETENDED)
    with pytest.raises(WrongInput, match=r"^there is no text in it; give another$"):
        make_beside(order(tmp_path / "refused", ["a p r", "b q s"], model="refused by 0"), heard, PRETENDED)


def test_what_would_end_one_process_ends_several(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(OSError, match="No space left") as error:
        make_beside(order(tmp_path, ["a p r", "b q s breaks", "c t u"]), heard, PRETENDED)
    assert error.value.errno == 28
    assert heard.of("end b q s breaks") == [False]


def test_a_time_is_spent_by_several(tmp_path: Path) -> None:
    cells = ["uniform", "b p s", "c q t", "same p s", "e q v dies"]
    asked, heard = order(tmp_path, cells, until=time.perf_counter() + 1000), Heard()
    make_beside(asked, heard, PRETENDED)
    states = {(row.cell, row.share): row.state for row in Rows(tmp_path / ROWS) if row.cell != DENSE}
    dead = {("e q v dies", 0.25): FAILED}
    assert states == {(cell, share): COMPLETE for cell in cells[:4] for share in (0.25, 1.0)} | dead
    assert set(heard.workers) == {"uniform", "b p s", "c q t", "e q v dies"}


# -- their ends ---------------------------------------------------------------------------------------

CHILD = """
import sys, time
from prunekit.run.crew import hear_parent
from prunekit.system.ending import tidy_ending
import os
asked, tell = hear_parent()
print("not an answer", flush=True)
try:
    with tidy_ending():
        tell({"pid": os.getpid(), "asked": asked.get()})
        time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[1], "w").close()
"""
PARENT = """
import signal, sys, time
from pathlib import Path
from prunekit.run.crew import Crew
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background it is ignored
with Crew([sys.executable, "-c", *sys.argv[1:3]]) as crew:
    crew.start(0, Path(sys.argv[2] + ".log"))
    crew.tell(0, {"make": "something"})
    number, told = crew.hear()
    assert told["asked"] == {"make": "something"}
    print(told["pid"], flush=True)
    time.sleep(60)
"""


def children(of: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(of)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_has_started_them(tmp_path: Path, how: int) -> None:
    tidied = tmp_path / "tidied"
    command = [sys.executable, "-c", PARENT, CHILD, str(tidied)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    with parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(how)
        parent.wait()
        end = time.monotonic() + 20
        while is_there(pid) and time.monotonic() < end:
            time.sleep(0.01)
    assert not is_there(pid)
    assert tidied.exists()
    assert (tmp_path / "tidied.log").read_text() == "not an answer\n"


def test_of_one_that_dies_its_last_words_are_told(tmp_path: Path) -> None:
    (log := tmp_path / "log").write_text("of one before\n")
    with Crew([sys.executable, "-S", "-c", "import sys; print('no room', file=sys.stderr); sys.exit(3)"]) as crew:
        crew.start(0, log)
        heard = crew.hear()
        assert heard is not None
        assert isinstance(heard[1], Ended)
        assert heard[1].why == "its process ended with code 3: no room"
        assert crew.hear(0.01) is None
    assert log.read_text() == "of one before\nno room\n"


def test_what_workers_leave_is_known_as_theirs_and_nothing_else_is(tmp_path: Path) -> None:
    place = tmp_path / "out"
    theirs = ["worker.log", ".prunekit.lock", "walks/walk-ab/manifest.json", "trial-ab/ledger.jsonl"]
    with claimed(place, {"suite": 1}, "a comparison"):
        for name in theirs:
            (file := place / "model-0" / "worker-1" / name).parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    (mine := place / "worker.log").touch()
    with (
        pytest.raises(WrongInput, match=r"holds worker\.log, which prunekit has not made"),
        claimed(place, {"suite": 2}, "a comparison", overwrite=True),
    ):
        pass
    mine.unlink()
    with claimed(place, {"suite": 2}, "a comparison", overwrite=True):
        assert not (place / "model-0").exists()


# -- what cannot be ------------------------------------------------------------------------------------


def test_several_workers_are_refused_where_there_cannot_be_any(saved_tiny: Any, tmp_path: Path) -> None:
    from prunekit.testing import tiny

    asked: dict[str, Any] = {
        "recipe": "fast",
        "recipes": ["fast"],
        "output": tmp_path / "out",
        "workers": 2,
        "quiet": True,
    }
    with pytest.raises(WrongInput, match="in memory cannot be sent to them; save it and give its folder"):
        prunekit.compare(tiny("llama"), **asked)
    with pytest.raises(WrongInput, match="engine ray shares out the work inside a cell"):
        prunekit.compare("m", engine="ray", **asked)
    with pytest.raises(WrongInput, match="workers are 1 or more, not 0"):
        prunekit.compare("m", **asked | dict[str, Any](workers=0))
    assert not (tmp_path / "out").exists()


# -- processes that make cells -------------------------------------------------------------------------

TIMES = {"seconds": 0.0, "wall": 0.0, "stages": {}, "passes": {}}


def timeless(rows: Iterable[Row]) -> dict[Any, Row]:
    """Rows by key, the names of passes left in, so that it is seen who could have shared one."""
    return {row.key: replace(row, **TIMES | {"passes": dict.fromkeys(row.passes, 0.0)}) for row in rows}  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_workers_make_the_rows_that_one_makes(quick: Any, tmp_path: Path) -> None:
    keys = {key: value for key, value in quick().items() if key.startswith("data__")}
    asked: dict[str, Any] = {
        "recipe": "fast",
        "pruners": ["magnitude"],
        "allocators": ["uniform", "table", "random"],
        **keys,
    }
    asked |= {"cells": {"no such": {"allocator": {"name": "milp", "limits": [["nonsense", 0.5]]}}}, "seeds": 2}
    heard = Heard()
    one = prunekit.compare(MODEL, **asked, output=tmp_path / "one", quiet=True)
    two = prunekit.compare(MODEL, **asked, output=tmp_path / "two", workers=2, progress=heard)
    assert timeless(one.rows) == timeless(two.rows)
    assert one.places == two.places
    standing = [[each.standing for each in found.leaderboard(*found.places[0])] for found in (one, two)]
    assert standing[0] == standing[1]
    assert any("2 workers side by side" in line for line in heard.of("say"))
    assert {path.name for path in (tmp_path / "two" / "model-0").iterdir()} == {"worker-0", "worker-1"}
    told = {row.cell for row in two.rows if row.state == COMPLETE} - {DENSE}
    assert {name.split(",")[0] for name in heard.workers} == told
    times = Counter(
        path.name for path in (tmp_path / "two" / "model-0").glob("*/walks/walk-*") if any(path.glob("*.safetensors"))
    )
    readers = Counter(name for row in two.rows for name in row.passes)
    assert set(readers) <= set(times)
    assert {times[name] for name, rows in readers.items() if rows > 1} == {1}  # also where the readers are two seeds
    again = prunekit.compare(MODEL, **asked, output=tmp_path / "two", quiet=True)  # by one, nothing is left to do
    assert list(again.rows) == list(two.rows)


@pytest.mark.slow
def test_killed_at_work_nobody_is_left_and_the_same_command_goes_on(quick: Any, tmp_path: Path) -> None:
    keys = {key: value for key, value in quick().items() if key.startswith("data__")}
    asked: dict[str, Any] = {
        "recipe": "fast",
        "pruners": ["magnitude", "wanda"],
        "allocators": ["uniform", "table"],
        **keys,
    }
    script = "import sys, json, prunekit; prunekit.compare(sys.argv[1], **json.loads(sys.argv[2]))"
    told = json.dumps(asked | {"output": str(tmp_path / "out"), "workers": 2, "quiet": True})
    command = [sys.executable, "-c", script, str(MODEL), told]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    rows = tmp_path / "out" / ROWS
    with subprocess.Popen(command, env=environment) as parent:
        while not rows.exists() or len(rows.read_text().splitlines()) < 3:
            assert parent.poll() is None
            time.sleep(0.05)
        os.kill(min(children(parent.pid)), signal.SIGKILL)  # a worker first: its cell fails
        while "SIGKILL" not in rows.read_text():
            assert parent.poll() is None
            time.sleep(0.05)
        others = children(parent.pid)
        parent.kill()
    end = time.monotonic() + 60
    while any(map(is_there, others)) and time.monotonic() < end:
        time.sleep(0.05)
    assert others
    assert not any(map(is_there, others))
    before = Rows(rows).found
    subprocess.run(command, env=environment, check=True)
    found = list(Rows(rows))
    assert all(before[row.key] == row for row in found if row.key in before)
    (failed,) = [row for row in found if row.state != COMPLETE]
    assert "ended by SIGKILL" in failed.reason
    whole = timeless(prunekit.compare(MODEL, **asked, output=tmp_path / "one", quiet=True).rows)
    assert {key: row for key, row in whole.items() if key != failed.key} == {
        key: row for key, row in timeless(found).items() if key != failed.key
    }
