"""An exported directory is believed only when a fresh process finds the same model in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from prunekit.export import NotVerified, Verified, save, to_transformers, verify
from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.testing.models import tiny

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


@pytest.mark.parametrize(
    ("model_type", "blocks", "code", "expected"),
    [
        pytest.param(
            "opt", [0], "import", "PrunekitOPTForCausalLM", id="after import prunekit", marks=pytest.mark.slow
        ),
        pytest.param(
            "qwen3", [0], "bundled", "PrunekitQwen3ForCausalLM", id="with bundled code", marks=pytest.mark.slow
        ),
        pytest.param("llama", [0, 1, 2], "import", "LlamaForCausalLM", id="transformers only"),
    ],
)
def test_every_route_is_verified(
    model_type: str,
    blocks: list[int],
    code: Literal["import", "bundled"],
    expected: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if expected.startswith("Prunekit"):  # what transformers alone loads, it loads in a fork as well
        request.getfixturevalue("fresh")
    model, adapter = tiny(model_type), adapter_for(model_type)
    for site in adapter.sites(model):
        if site.block in blocks:
            weight = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
            adapter.remove(model, site, Candidate((1,), weight))
    save(to_transformers(model, adapter), tmp_path, code=code)
    with torch.no_grad():
        logits = model(IDS).logits
    parameters = sum(p.numel() for p in model.parameters())
    found = verify(tmp_path, IDS, logits, parameters, tolerance=1e-5)
    assert (found.parameters, found.model_class) == (parameters, expected)


def test_one_logit_that_differs_is_found(tmp_path: Path) -> None:
    model = tiny("llama")
    save(to_transformers(model, adapter_for("llama")), tmp_path)
    with torch.no_grad():
        logits = model(IDS).logits
    logits[0, -1, -1] += 1
    with pytest.raises(NotVerified, match=r"differ by 1; 0\.0001 is allowed"):
        verify(tmp_path, IDS, logits, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        pytest.param(Verified(90, 0.0, "X"), "has 90 parameters, not 100", id="size"),
        pytest.param(Verified(100, 0.2, "X"), r"logits of .* differ by 0\.2; 0\.1 is allowed", id="logits"),
        pytest.param(Verified(100, float("nan"), "X"), "differ by nan", id="nan"),
        pytest.param(None, "does not load in a fresh process:\nboom", id="broken"),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_what_differs_is_said(found: Verified | None, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if found is None:
            return subprocess.CompletedProcess(command, 1, "", "boom")
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(asdict(found))}\n", "")

    monkeypatch.setattr(subprocess, "run", child)
    with pytest.raises(NotVerified, match=sentence):
        verify("somewhere", IDS, torch.zeros(1, 6, 61), 100, tolerance=0.1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_whoever_stops_the_verification_leaves_neither_process_nor_folder(end: int, tmp_path: Path, forks: Any) -> None:
    model = tiny("llama")
    save(to_transformers(model, adapter_for("llama")), tmp_path / "model")
    script, scratch, pid = tmp_path / "script.py", tmp_path / "scratch", tmp_path / "pid"
    script.write_text(
        "import os, sys, torch; from pathlib import Path; from prunekit.export import verify\n"
        "Path(sys.argv[2]).write_text(str(os.getpid()))\n"
        "verify(sys.argv[1], torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 8), 1)"
    )
    scratch.mkdir()
    with ThreadPoolExecutor(1) as pool:
        command = [sys.executable, "-P", script, tmp_path / "model", pid]
        done = pool.submit(forks.run, command, env=os.environ | {"TMPDIR": str(scratch)})
        until(lambda: pid.exists() and bool(pid.read_text()))
        parent = int(pid.read_text())
        children = Path(f"/proc/{parent}/task/{parent}/children")
        until(lambda: any(scratch.glob("prunekit-verify-*/probe.safetensors")) and bool(children.read_text().split()))
        (child,) = children.read_text().split()
        os.kill(parent, end)
        assert done.result().returncode != 0
    until(lambda: not list(scratch.glob("prunekit-verify-*")))
    until(lambda: state_of(child) in ("", "Z"))


def until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come true in a minute")


def state_of(process: str) -> str:
    """Of a process; Z where only its entry is left, "" where nothing is."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
