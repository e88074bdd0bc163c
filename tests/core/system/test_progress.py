import io

import pytest
from rich.console import Console
from rich.progress import TimeRemainingColumn

from prunekit.system.progress import PlainProgress, Progress, RichProgress, progress_for, span


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_base_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    with progress.stage("walk", 3) as stage:
        stage.advance(note="block 1")
    progress.say("a line")
    assert capsys.readouterr() == ("", "")


def test_plain_lines_come_every_few_seconds_and_at_the_end() -> None:
    file, clock = io.StringIO(), Clock()
    progress = PlainProgress(file, every=5, clock=clock)
    with progress.stage("walk", 10) as stage:
        for block in range(10):
            clock.now += 2
            stage.advance(note=f"block {block}")
    assert file.getvalue().splitlines() == [
        "walk 3/10, about 14.0 s left: block 2",
        "walk 6/10, about 8.0 s left: block 5",
        "walk 9/10, about 2.0 s left: block 8",
        "walk 10/10, done in 20.0 s",
    ]


def test_a_stage_of_unknown_length_has_no_estimate() -> None:
    file, clock = io.StringIO(), Clock()
    with PlainProgress(file, every=5, clock=clock).stage("search", 0) as stage:
        clock.now = 6
        stage.advance(16, "loss 0.1")
    assert file.getvalue().splitlines() == ["search 16: loss 0.1", "search 16, done in 6.0 s"]


def test_what_is_known_of_the_rest_takes_the_place_of_the_pace() -> None:
    file, clock = io.StringIO(), Clock()
    with PlainProgress(file, every=5, clock=clock).stage("compare", 10) as stage:
        stage.expect(10, None)
        clock.now = 6
        stage.advance(1, "dense")
        stage.expect(4, 30)
        clock.now = 16
        stage.advance(1, "one")
        clock.now = 60
        stage.advance(1, "two")
        stage.advance(1, "three")
    assert file.getvalue().splitlines() == [
        "compare 1/10: dense",
        "compare 2/4, about 20.0 s left: one",
        "compare 3/4, about 0.0 s left: two",
        "compare 4/4, done in 1:00 min",
    ]


def test_bars_show_what_is_known_of_the_rest() -> None:
    progress = RichProgress(Console(file=io.StringIO(), force_terminal=True, width=120))
    column = next(each for each in progress.bars.columns if isinstance(each, TimeRemainingColumn))
    with progress.stage("compare", 10) as stage:
        stage.expect(4, 7200)
        (task,) = progress.bars.tasks
        assert task.total == 4
        assert str(column.render(task)) == "2:00 h"
        stage.expect(4, None)
        assert str(column.render(task)) == "-:--:--"


def test_a_failed_stage_is_not_said_to_be_done() -> None:
    file = io.StringIO()
    with pytest.raises(RuntimeError), PlainProgress(file).stage("walk", 3):
        raise RuntimeError
    assert file.getvalue() == ""


def test_bars_leave_a_line_for_each_stage_and_markup_is_only_text() -> None:
    file = io.StringIO()
    progress = RichProgress(Console(file=file, force_terminal=True, color_system=None, width=100))
    with progress.stage("walk [1]", 2) as outer:
        with progress.stage("search", 0) as inner:
            inner.advance(3, "loss [0.1]")
        outer.advance()
        progress.say("warning: [careful]")
    text = file.getvalue()
    assert "✓ search, " in text
    assert "✓ walk [1], " in text
    assert "warning: [careful]" in text
    assert progress.open == 0


def test_bars_stop_when_a_stage_fails() -> None:
    progress = RichProgress(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError), progress.stage("walk", 2):
        raise RuntimeError
    assert progress.open == 0
    assert not progress.bars.live.is_started


@pytest.mark.parametrize(("terminal", "kind"), [(True, RichProgress), (False, PlainProgress)])
def test_bars_on_a_terminal_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, terminal: bool, kind: type) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert type(progress_for()) is kind
    assert type(progress_for(quiet=True)) is Progress


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (4.24, "4.2 s"), (59.97, "1:00 min"), (185, "3:05 min"), (7_800, "2:10 h")]
)
def test_spans_are_for_people(seconds: float, text: str) -> None:
    assert span(seconds) == text
