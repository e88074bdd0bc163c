"""A time is spent on the better cells and never exceeded, by a clock that is pretended."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from prunekit.report.comparison import COMPLETE, FAILED, Row
from prunekit.run.halving import QUARTER, SHARES, WHOLE, Alone, Costs, Halving

Key = tuple[str, float, int, float]


@dataclass
class Method:
    """What a cell takes and gives."""

    perplexity: float = 20.0
    passes: float = 10.0  # seconds of its calibration pass on all of the text
    still: float = 0.0  # seconds of it however little text there is
    own: float = 1.0  # seconds of the rest
    reads: str = ""  # whose pass it reads; its own
    state: str = COMPLETE


@dataclass
class World:
    """Cells that only pretend to work, and a clock that only they move."""

    cells: dict[str, Method]
    time: float
    sparsities: Sequence[float] = (0.5,)
    seeds: int = 1
    now: float = 0.0
    rows: dict[Key, Row] = field(default_factory=dict)
    left: dict[Key, str] = field(default_factory=dict)
    expected: list[tuple[int, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    made: list[Key] = field(default_factory=list)

    def run(self, workers: int = 1) -> World:
        costs, begun = Costs(), self.now
        makers = Alone(self.make) if workers == 1 else Pretended(self, workers)
        for row in self.rows.values():
            costs.add(row)
        Halving(
            list(self.cells), self.sparsities, self.seeds, "uniform", begun + self.time, costs, makers,
            lambda *key: key in self.rows, self.leave_out, lambda *told: self.expected.append(told), self.said.append,
            clock=lambda: self.now,
        ).run()  # fmt: skip
        return self

    def make(self, *key: float | str) -> Row:
        cell, sparsity, seed, share = key
        if key in self.rows:
            return self.rows[key]  # type: ignore[index]
        each = self.cells[cell]  # type: ignore[index]
        name = f"{each.reads or cell} {sparsity} {seed} {share}"
        takes = each.still + share * each.passes  # type: ignore[operator]
        there = any(name in row.passes for row in self.rows.values())
        wall = each.own + (0.0 if there else takes)
        self.now += wall
        self.made.append(key)  # type: ignore[arg-type]
        self.rows[key] = Row(  # type: ignore[index]
            "m", *key, state=each.state, recipe=str(key), perplexity=each.perplexity, wall=wall,  # type: ignore[arg-type]
            passes={name: takes}, stages={"prune": takes, "search": each.own},
        )  # fmt: skip
        return self.rows[key]  # type: ignore[index]

    def leave_out(self, cell: str, sparsity: float, seed: int, share: float, reason: str) -> None:
        self.left[cell, sparsity, seed, share] = reason

    def on(self, share: float, sparsity: float = 0.5) -> list[str]:
        return [cell for cell, s, seed, at in self.made if (s, seed, at) == (sparsity, 0, share)]


def several(count: int, **method: float) -> dict[str, Method]:
    """Cells from the worst to the best, and the reference in between."""
    found = {f"cell {i}": Method(perplexity=30.0 - i, **method) for i in range(count)}  # type: ignore[arg-type]
    return {**dict(list(found.items())[:2]), "uniform": Method(perplexity=50.0, **method), **found}  # type: ignore[arg-type]


def drawn(rng: random.Random, still: float) -> World:
    """A world of up to nine methods, with time for a few of them or for all; `still` does not grow with the text."""
    cells = {
        f"cell {i}": Method(20 + rng.random(), rng.uniform(8, 12), still, rng.uniform(0.5, 4), f"pruner {i % 3}")
        for i in range(rng.randint(1, 9))
    }
    cells["uniform"] = Method(25.0, 10.0, still, 1.0)
    sparsities, one = rng.choice([(0.5,), (0.3, 0.5)]), still + 2.5 + 4  # seconds of one on a quarter, at most
    return World(cells, one * rng.uniform(1, 60), sparsities, rng.choice([1, 1, 3]))


def check_finals(world: World) -> None:
    """On all of the text a cell has all seeds before the first that was left out."""
    for cell in world.cells:
        for sparsity in world.sparsities:
            finals = {s for c, sp, s, share in world.made if (c, sp, share) == (cell, sparsity, WHOLE)}
            named = {s for c, sp, s, _ in world.left if (c, sp) == (cell, sparsity)}
            assert finals == set(range(min(named, default=world.seeds)))


@pytest.mark.parametrize("seed", range(60))
def test_the_end_is_kept_and_what_has_no_row_is_named(seed: int) -> None:
    rng = random.Random(seed)
    still = rng.choice([0.0, 0.5, 5.0])
    world = drawn(rng, still).run()
    assert world.now <= world.time
    check_finals(world)
    assert world.expected[-1] == (0, 0)
    assert all(rows >= 0 and 0 <= seconds <= world.time for rows, seconds in world.expected)


@pytest.mark.parametrize("part", ["own", "still"])
def test_what_does_not_grow_with_the_text_is_not_scaled(part: str) -> None:
    cells = several(6, passes=2.0) if part == "own" else several(6, passes=2.0, own=0.0)
    for method in cells.values():
        setattr(method, part, 8.0)
    quarter, whole = 8.5, 10.0
    world = World(cells, 7 * (quarter + 1.1 * whole) + 1).run()  # as much again were there not time for two of them
    assert sorted(world.on(WHOLE)) == sorted(cells)
    assert not world.left


def test_with_enough_time_there_is_no_step_between() -> None:
    world = World(several(5), 1000).run()
    assert {share for *_, share in world.made} == {QUARTER, WHOLE}
    assert len(world.made) == 12


def test_the_better_ones_get_more_of_the_text() -> None:
    world = World(several(12), 100).run()
    tried, halves, finals = (world.on(share) for share in SHARES)
    assert set(tried) == set(world.cells)
    assert set(halves) < set(tried) - {"uniform"}
    best = sorted(tried, key=lambda cell: world.cells[cell].perplexity)
    assert set(halves) == set(best[: len(halves)])
    assert set(finals) == {"uniform", *best[: len(finals) - 1]}
    assert len(finals) > 2
    assert 80 <= world.now <= 100
    assert all("others were better on" in reason for reason in world.left.values())


def test_a_pass_that_several_read_is_counted_once() -> None:
    cells = {"uniform": Method(50.0, 40.0)} | {f"cell {i}": Method(20.0 + i, 40.0, reads="one") for i in range(5)}
    # each alone: 41 s; the five together 45, the reference 41, all of them 26 on a quarter
    world = World(cells, 26 + 1.1 * 86 + 5).run()
    assert sorted(world.on(WHOLE)) == sorted(cells)


def test_a_reference_that_seems_too_long_is_measured_on_half_first() -> None:
    cells = {name: Method(passes=2.0, still=8.0, own=0.0) for name in ("uniform", "cell")}
    world = World(cells, 41).run()
    # scaled by the share alone, all of the text would take 34 of the 32.5 s that the first try leaves
    assert world.made[:3] == [("uniform", 0.5, 0, share) for share in SHARES]
    assert world.now <= 41
    assert World(cells, 60).run().on(WHOLE) == ["uniform", "cell"]


def test_time_for_one_sparsity_is_not_kept_back_for_two() -> None:
    world = World(several(3), 60, (0.3, 0.5)).run()
    assert len(world.on(WHOLE, 0.3)) > len(world.on(WHOLE, 0.5)) == 1
    assert world.now <= 60


def test_a_time_for_nothing_ends_after_one_try_and_says_how_much_is_needed() -> None:
    world = World(several(3), 4.0).run()
    assert [*world.made] == [("uniform", 0.5, 0, QUARTER)]
    assert len(world.left) == len(world.cells)
    assert "no time for a cell on all of the text: it takes about 12.1 s more" in world.said[0]


def test_with_more_time_only_what_is_missing_is_made() -> None:
    world = World(several(8), 60).run()
    before, some = set(world.made), set(world.on(WHOLE))
    world.made.clear()
    world.left.clear()
    world.time = 300
    world.run()
    assert not before & set(world.made)
    assert set(world.on(WHOLE)) == set(world.cells) - some


def test_what_breaks_on_a_part_of_the_text_comes_no_further() -> None:
    cells = several(4)
    cells["cell 3"].state = FAILED
    world = World(cells, 500).run()
    assert "cell 3" in world.on(QUARTER)
    assert "cell 3" not in world.on(WHOLE)
    assert world.expected[-1] == (0, 0)
    cells["uniform"].state = FAILED
    world = World(cells, 500).run()
    assert len(world.on(WHOLE)) == 3


@dataclass
class Pretended:
    """Workers that make rows of a `World` side by side, each with the passes that it has made itself."""

    world: World
    size: int
    work: list[tuple[float, int, Row]] = field(default_factory=list)  # (when it is done, by whom, row)
    done: list[tuple[Row, int]] = field(default_factory=list)
    shelves: dict[int, set[str]] = field(default_factory=dict)

    def begin(self, cell: str, sparsity: float, seed: int, share: float) -> None:
        key = cell, sparsity, seed, share
        world, free = self.world, sorted({*range(self.size)} - {by for _, by, _ in self.work})
        if key in world.rows:
            self.done.append((world.rows[key], 0))
            return
        begun = world.now
        row = world.make(*key)
        ((name, takes),) = row.passes.items()
        by = next((one for one in free if name in self.shelves.get(one, ())), free[0])
        shelf = self.shelves.setdefault(by, set())
        wall = row.stages["search"] + (0.0 if name in shelf else takes)
        shelf.add(name)
        del world.rows[key]
        world.now = begun
        self.work.append((begun + wall, by, replace(row, wall=wall)))

    def finished(self, *, every: bool = False) -> list[tuple[Row, int]]:
        while self.work and (every or len(self.work) == self.size):
            first = min(self.work, key=lambda each: each[:2])
            self.work.remove(first)
            self.world.now = max(self.world.now, first[0])
            self.world.rows[first[2].key[1:]] = first[2]
            self.done.append((first[2], first[1]))
        done, self.done = self.done, []
        return done


@pytest.mark.parametrize("seed", range(30))
def test_the_end_is_kept_by_several_workers_too(seed: int) -> None:
    rng = random.Random(seed)
    still, workers = rng.choice([0.0, 0.5, 5.0]), rng.randint(2, 4)
    world = drawn(rng, still)
    world.run(workers)
    assert world.now <= world.time
    check_finals(world)
    assert len(world.made) == len(set(world.made))
    assert world.expected[-1] == (0, 0)
    assert all(rows >= 0 and 0 <= seconds <= world.time for rows, seconds in world.expected)


def test_more_workers_bring_more_cells_to_all_of_the_text() -> None:
    finals = [len(World(several(12), 100).run(workers).on(WHOLE)) for workers in (1, 2, 4)]
    assert finals[0] < finals[1] < finals[2]
    assert World(several(12), 100).run(4).now <= 100
