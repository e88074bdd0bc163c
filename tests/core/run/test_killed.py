"""A process that is killed outright loses nothing but time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from prunekit.demo import MODEL

FILES = ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl")
COMMAND = [
    *(sys.executable, "-m", "prunekit.cli", "prune", str(MODEL), "--sparsity", "0.5", "--dataset", "python-docs"),
    *("--calibration-tokens", "8192", "--search-tokens", "4096", "--seqlen", "256", "--quiet"),
    *("--recipe", "search", "--set", "allocator.inner.generations=3", "--set", "data.evaluation_tokens=2048"),
]


def started(output):
    return subprocess.Popen([*COMMAND, "--output", str(output)], env=os.environ | {"OMP_NUM_THREADS": "1"})


def sites_done(place):
    return sum(len(json.loads(file.read_text())["content"]["sites"]) for file in place.glob("walk-*/manifest.json"))


def questions_asked(place):
    ledger = place / "ledger.jsonl"
    return ledger.read_text().count("question") if ledger.exists() else 0


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_command_to_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert started(whole).wait() == 0
    place = tmp_path / "killed.partial"
    for far_enough in (lambda: sites_done(place) >= 5, lambda: questions_asked(place) >= 9):
        process = started(killed)
        while not far_enough():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not killed.exists()
    assert started(killed).wait() == 0
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
