"""Progress for programs: the same stages as people see, one JSON object a line, valid whatever happens."""

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.errors import WrongInput
from prunekit.system.events import MOST_LETTERS, Events, Messages, encode, open_events, resident
from prunekit.system.progress import PlainProgress, Progress, Several, listening, progress_for


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def strict(line: bytes) -> Any:
    """A line of JSON, without the NaN that Python's parser lets pass."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(line, parse_constant=refuse)


@pytest.fixture
def told() -> tuple[Events, list[bytes], Clock]:
    lines, clock = list[bytes](), Clock()
    return Events(lines.append, every=1.0, clock=clock), lines, clock


def test_steps_are_told_at_most_once_a_second_with_an_estimate_and_ends_always(told: Any) -> None:
    events, lines, clock = told
    with events.stage("calibration", 10) as stage:
        for step in range(10):
            clock.now += 0.4
            stage.advance(note=f"block {step}")
    found = [strict(line) for line in lines]
    assert [(f["state"], f["done"], f["of"]) for f in found] == [
        ("begun", 0, 10),
        ("running", 3, 10),
        ("running", 6, 10),
        ("running", 9, 10),
        ("done", 10, 10),
    ]
    assert [f["estimate"] for f in found] == [None, pytest.approx(2.8), pytest.approx(1.6), pytest.approx(0.4), 0]
    assert found[1]["note"] == "block 2"
    assert (found[-1]["seconds"], found[-1]["at"]) == (4.0, 4.0)
    assert all(f["memory"] > 1 << 20 for f in found)


def test_stages_say_what_they_are_within_and_whether_they_were_stopped(told: Any) -> None:
    events, lines, _ = told
    with pytest.raises(KeyboardInterrupt), events.stage("compare", 2), events.stage("search", 0):
        raise KeyboardInterrupt
    found = [strict(line) for line in lines]
    assert [(f["stage"], f["within"], f["state"], f["of"]) for f in found] == [
        ("compare", [], "begun", 2),
        ("search", ["compare"], "begun", None),
        ("search", ["compare"], "stopped", None),
        ("compare", [], "stopped", 2),
    ]


def test_people_and_programs_are_told_the_same(told: Any) -> None:
    events, lines, clock = told
    text = io.StringIO()
    both = Several([PlainProgress(text, every=1.0, clock=clock), events])
    with both.stage("walk", 4) as stage:
        for _ in range(4):
            clock.now += 1
            stage.advance()
    both.say("a line")
    shown = text.getvalue().splitlines()
    found = [strict(line) for line in lines]
    running = [f for f in found if f.get("state") == "running" and f["done"] < 4]
    assert [f"walk {f['done']}/{f['of']}, about {f['estimate']:.1f} s left" for f in running] == shown[:3]
    assert (found[-1]["event"], found[-1]["text"]) == ("message", shown[-1])


def test_a_command_is_told_of_by_whoever_shows_progress(told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    events, lines, _ = told
    with listening(events):
        progress_for(quiet=True).say("for programs")
        assert capsys.readouterr() == ("", "")
        progress_for().say("for both")
    assert capsys.readouterr().err == "for both\n"
    assert [strict(line)["text"] for line in lines] == ["for programs", "for both"]
    assert type(progress_for(quiet=True)) is Progress


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner),
    max_leaves=8,
)


@settings(max_examples=60)
@given(JSONS)
def test_every_value_is_one_line_of_valid_json(value: Any) -> None:
    line = encode(value)
    assert line.count(b"\n") == 1
    assert line.isascii()
    strict(line)


def test_what_is_not_finite_is_null_and_numbers_of_numpy_are_numbers() -> None:
    import numpy as np

    found = strict(encode({"a": [math.nan, math.inf, 1.5], "b": np.float32(2), "c": np.float64("nan"), "d": Path("x")}))
    assert found == {"a": [None, None, 1.5], "b": 2.0, "c": None, "d": "x"}


def test_the_end_is_the_last_line_and_says_how_it_ended(told: Any) -> None:
    events, lines, _ = told
    events.begin("prune")
    events.end(130, None, "interrupted")
    events.say("late")
    events.end(0, {})
    first, last = map(strict, lines)
    assert (first["event"], first["command"], first["pid"], first["schema"]) == ("begin", "prune", os.getpid(), 1)
    assert (last["event"], last["status"], last["code"], last["error"]) == ("end", "interrupted", 130, "interrupted")


def test_a_reader_that_goes_away_does_not_end_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    events = open_events(str(write))
    events.begin("prune")
    os.close(read)
    with events.stage("walk", 1) as stage:
        stage.advance()
    os.close(write)
    assert capsys.readouterr().err == "warning: --json-lines cannot be written any more; the run goes on\n"


def test_a_file_is_added_to_behind_the_half_line_of_a_process_that_was_killed(tmp_path: Path) -> None:
    file = tmp_path / "progress.jsonl"
    file.write_bytes(b'{"event": "begin"}\n{"event": "pro')
    open_events(str(file)).say("again")
    lines = file.read_bytes().splitlines()
    assert lines[:2] == [b'{"event": "begin"}', b'{"event": "pro']
    assert strict(lines[2])["text"] == "again"
    open_events(str(file)).say("and again")
    assert len(file.read_bytes().splitlines()) == 4


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("1", "would mix with the results"),
        ("987654", "no such descriptor is open"),
        ("9" * 30, "no such descriptor is open"),
        ("gone/x.jsonl", "cannot be written: No such file"),
        (".", "cannot be written: Is a directory"),
        ("a\0b", "cannot be written"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(
    place: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongInput, match=sentence):
        open_events(place)


def test_a_descriptor_for_reading_is_refused_when_it_begins() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(WrongInput, match="nothing can be written there"):
            open_events(str(read)).begin("prune")
    finally:
        os.close(read)
        os.close(write)


def test_what_others_write_on_standard_error_becomes_messages(told: Any) -> None:
    events, lines, _ = told
    stream = Messages(events)
    print("one\n\ntwo", file=stream)
    stream.write("half")
    stream.write("x" * 2 * MOST_LETTERS)
    stream.finish()
    stream.finish()
    texts = [strict(line)["text"] for line in lines]
    assert texts == ["one", "two", "half" + "x" * (MOST_LETTERS - 4)]


def test_memory_is_that_of_the_process() -> None:
    before = resident()
    held = bytearray(b"\1") * (64 << 20)
    after = resident()
    assert before is not None
    assert after is not None
    assert after - before > len(held) // 2
