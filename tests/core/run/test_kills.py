"""Killed at any moment, the same command goes on to the same bytes, and nothing of the user's is gone.

A process of its own runs every command once to its end, then lets copies of itself run it and be killed: at random
times, and just before random changes of files. It is told what to do by this very file.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK: dict[str, Any] = {
    "allocator": {"name": "evolution", "generations": 2, "offspring": 4},
    "data__dataset": "python-docs",
    "data__calibration_tokens": 512,
    "data__search_tokens": 256,
    "data__evaluation_tokens": 256,
    "data__seqlen": 32,
    "verify": False,
    "quiet": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "prune": {"sparsity": 0.5},
    "overwrite": {"sparsity": 0.5, "overwrite": True},
    "family": {"sparsity": [0.3, 0.5], "pruner": "magnitude"},
    "finishers": {"sparsity": 0.5, "finishers": [{"name": "distillation", "epochs": 2}]},
    "tune": {"trials": 3, "space": {"damping": {"low": 1e-3, "high": 0.1, "log": True}}, "metric": "objective"},
}
CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.move"}
TIMED = {"report.json", "README.md", "pareto.json", "files.json", "study.log", "base.json", "run.json", "seconds.json"}
MINE = ("out.old", ".out.replaced", "notes.partial")  # the user's, beside the output


@pytest.mark.slow
@pytest.mark.parametrize("how", ["time", "change"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_command_goes_on_to_the_same_bytes(saved_tiny: Any, tmp_path: Path, kind: str, how: str) -> None:
    command = [sys.executable, __file__, kind, how, str(saved_tiny()), str(tmp_path), "20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] > 10
    assert found["wrong"] == []


def run(kind: str, model: str, output: Path) -> None:
    import prunekit

    call = prunekit.tune if kind == "tune" else prunekit.prune
    call(model, output=output, **QUICK | KINDS[kind])


def content(output: Path) -> dict[str, str]:
    """Digests of what must come out the same."""
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in TIMED and not path.name.startswith(".")
    }


def in_a_copy(work: Callable[[], None]) -> int:
    """The process that does some work and is gone then."""
    if child := os.fork():
        return child
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def dying(root: Path, left: int) -> None:
    """From now on, die before a change of a file below a folder, when so many more have been made."""
    remaining = [left]

    def hook(event: str, arguments: Any) -> None:
        if event not in CHANGES or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            return
        if os.fspath(arguments[0]).startswith(str(root)):
            remaining[0] -= 1
            if remaining[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def counting(root: Path, file: Path) -> None:
    """Count such changes, into a file."""
    made = [0]

    def hook(event: str, arguments: Any) -> None:
        if event in CHANGES and arguments and isinstance(arguments[0], str | os.PathLike):
            if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
                return
            if os.fspath(arguments[0]).startswith(str(root)):
                made[0] += 1
                descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
                os.write(descriptor, str(made[0]).encode())
                os.close(descriptor)

    sys.addaudithook(hook)


def prepared(root: Path, kind: str, old: Path | None) -> Path:
    """A folder with things of the user's beside the output, and an old result in its place where one is replaced."""
    import shutil

    root.mkdir()
    for name in MINE:
        (root / name).mkdir()
        (root / name / "thesis.txt").write_text("years of work")
    if old is not None:
        shutil.copytree(old, root / "out")
    return root / "out"


def main(kind: str, how: str, model: str, place: Path, times: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    import prunekit.run.prune
    import prunekit.run.tune  # noqa: F401  what is imported before the copies are made is not imported in each

    draw, old = random.Random(f"{kind} {how}"), None
    if kind == "overwrite":
        old = place / "old"
        run("prune", model, old)
    whole = prepared(place / "whole", kind, old)
    counted, started = place / "count", time.monotonic()
    child = in_a_copy(lambda: (counting(whole.parent, counted), run(kind, model, whole))[1])
    assert os.waitpid(child, 0)[1] == 0
    seconds, changes = time.monotonic() - started, int(counted.read_text())
    expected, killed, wrong = content(whole), 0, list[str]()
    for number in range(times):
        output = prepared(place / str(number), kind, old)
        if how == "change":
            at: float = draw.randrange(changes)
            child = in_a_copy(lambda at=at, output=output: (dying(output.parent, int(at)), run(kind, model, output))[1])
        else:
            at = draw.uniform(0, seconds)
            child = in_a_copy(lambda output=output: run(kind, model, output))
            time.sleep(at)
            os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        partial = output.with_name("out.partial")
        if output.exists() and not (partial / "run.json").exists() and kind not in ("overwrite", "tune"):
            if content(output) != expected:  # it had ended: the same command would say that there is a result
                wrong.append(f"{at}: ended with other bytes")
            if partial.exists():
                partial.joinpath(".prunekit.lock").unlink(missing_ok=True)
                partial.rmdir()  # and held nothing else
            continue
        again = in_a_copy(lambda output=output: run(kind, model, output))
        if os.waitpid(again, 0)[1] != 0:
            wrong.append(f"{at}: it did not go on")
        elif content(output) != expected:
            wrong.append(f"{at}: other bytes")
        if any((output.parent / name / "thesis.txt").read_text() != "years of work" for name in MINE):
            wrong.append(f"{at}: something of the user's is gone")
        if {path.name for path in output.parent.iterdir()} != {"out", *MINE}:
            wrong.append(f"{at}: leftovers {[path.name for path in output.parent.iterdir()]}")
    return {"killed": killed, "changes": changes, "seconds": seconds, "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4], Path(sys.argv[4]), int(sys.argv[5]))))  # type: ignore[misc]
