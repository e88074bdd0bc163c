"""`--json-lines`: what a program that runs a command is told, to the last line, however the command ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from prunekit.cli.main import app
from prunekit.errors import CannotGoOn, WrongInput
from prunekit.run import prune as pruning
from prunekit.system.ending import Terminated
from prunekit.system.progress import Progress, progress_for, warn_once

SIDE = {"parameters": 100, "block_parameters": 80}
REPORT = {"dense": SIDE, "pruned": SIDE, "losses": {k: {"perplexity": float("nan")} for k in ("dense", "pruned")}}
SCRIPT = """
import signal, sys, time, warnings, typer

signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started in the background ignores it
from prunekit.cli.errors import Sentences
from prunekit.cli.options import JsonLines
from prunekit.system.progress import progress_for

app = typer.Typer(cls=Sentences, add_completion=False, pretty_exceptions_enable=False)

@app.command()
def prune(how: str, json_lines: JsonLines = None) -> dict:
    progress = progress_for()
    with progress.stage("work", 100) as stage:
        stage.advance()
        print("from somebody", file=sys.stderr)
        if how == "fails":
            raise KeyError("a fault")
        for _ in range(600 if how == "waits" else 0):
            time.sleep(0.1)
            stage.advance(0)
    return {"loss": float("inf")}

@app.command()
def other(): ...

app()
"""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run `prune` whose work shows a stage and a warning and ends as told: (the events, the exit code, the output)."""
    monkeypatch.chdir(tmp_path)

    def run(error: BaseException | None, *arguments: str) -> tuple[list[dict[str, Any]], int, str]:
        def prune(recipe: Any, job: Any) -> Any:
            warn_once.cache_clear()
            warn_once("careful")
            with job.progress.stage("calibration", 2) as stage:
                stage.advance()
                if error is not None:
                    raise error
            return SimpleNamespace(report=REPORT)

        monkeypatch.setattr(pruning, "prune", prune)
        done = CliRunner().invoke(
            app, ["prune", "m", "-o", "out", "--no-page", "--json-lines", "progress.jsonl", *arguments]
        )
        return (
            [json.loads(line) for line in Path("progress.jsonl").read_text().splitlines()],
            done.exit_code,
            done.stderr,
        )

    return run


def test_a_command_that_is_done_ends_with_its_result(ends: Any) -> None:
    events, code, said = ends(None)
    assert code == 0
    assert [e["event"] for e in events] == ["begin", "message", "progress", "progress", "end"]
    assert events[1]["text"] == "warning: careful"
    assert "calibration" in said  # people are told as ever
    assert (events[-1]["status"], events[-1]["code"], events[-1]["error"]) == ("done", 0, None)
    assert events[-1]["result"] == {"output": "out"} | REPORT | {
        "losses": {"dense": {"perplexity": None}, "pruned": {"perplexity": None}}
    }
    assert type(progress_for(quiet=True)) is Progress  # nobody listens any more


@pytest.mark.parametrize(
    ("error", "status", "code", "sentence"),
    [
        (WrongInput("no such thing"), "refused", 2, "no such thing"),
        (CannotGoOn("it broke"), "failed", 1, "it broke"),
        (KeyboardInterrupt(), "interrupted", 130, "interrupted; the same command continues from here"),
        (Terminated(), "interrupted", 143, "interrupted; the same command continues from here"),
        (OSError(28, "No space left"), "failed", 1, "the disk is full; make room"),
        (RuntimeError("two\nlines"), "failed", 1, "RuntimeError: two lines"),
    ],
)
def test_a_command_that_is_not_done_ends_with_what_was_said(
    ends: Any, error: BaseException, status: str, code: int, sentence: str
) -> None:
    events, ended, _ = ends(error, "--quiet")
    assert ended == code
    assert events[-2]["state"] == "stopped"
    last = events[-1]
    assert (last["event"], last["status"], last["code"], last["result"]) == ("end", status, code, None)
    assert last["error"].startswith(sentence)


def test_a_wrong_value_is_refused_in_the_last_event(ends: Any) -> None:
    events, code, _ = ends(None, "--seqlen", "many")
    assert (code, events[0]["event"], events[-1]["status"]) == (2, "begin", "refused")
    assert "--seqlen" in events[-1]["error"]


def test_all_commands_that_show_progress_have_it() -> None:
    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    having = {name for name, command in commands.items() if any("--json-lines" in p.opts for p in command.params)}
    quiet = {name for name, command in commands.items() if any("--quiet" in p.opts for p in command.params)}
    assert having == quiet >= {"prune", "tune", "compare", "evaluate", "export", "learn-budgets"}


# -- as a process -----------------------------------------------------------------------------------------


def strict(line: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_the_last_that_is_told(number: int, code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    read, write = os.pipe()
    command = [sys.executable, script, "prune", "waits", "--json-lines", str(write)]
    with (
        subprocess.Popen(command, pass_fds=[write], stderr=subprocess.PIPE, text=True) as process,
        os.fdopen(read) as lines,
    ):
        os.close(write)
        events = [strict(next(lines))]
        while events[-1].get("state") != "running":
            events.append(strict(next(lines)))
        process.send_signal(number)
        events += map(strict, lines)
        assert process.wait() == code
    assert [e["event"] for e in events].count("end") == 1
    assert (events[-1]["event"], events[-1]["status"], events[-1]["code"]) == ("end", "interrupted", code)
    assert events[-2]["state"] == "stopped"


@pytest.mark.parametrize(("how", "code"), [("ends", 0), ("fails", 1)])
def test_standard_error_holds_nothing_but_json(how: str, code: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, "prune", how, "--json-lines", "2"], capture_output=True, text=True, check=False
    )
    events = [strict(line) for line in done.stderr.splitlines()]
    assert done.returncode == events[-1]["code"] == code
    texts = [e["text"] for e in events if e["event"] == "message"]
    assert texts[0] == "from somebody"
    if how == "fails":
        assert texts[1] == "Traceback (most recent call last):"
        assert events[-1]["error"] == "KeyError: 'a fault'"
    else:
        assert events[-1]["result"] == {"loss": None}
