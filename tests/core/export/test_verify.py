"""An exported directory is believed only when a fresh process finds the same model in it."""

from __future__ import annotations

import json
import subprocess
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
        pytest.param("opt", [0], "import", "PrunekitOPTForCausalLM", id="after import prunekit"),
        pytest.param("qwen3", [0], "bundled", "PrunekitQwen3ForCausalLM", id="with bundled code"),
        pytest.param("llama", [0, 1, 2], "import", "LlamaForCausalLM", id="transformers only"),
    ],
)
def test_every_route_is_verified(
    model_type: str, blocks: list[int], code: Literal["import", "bundled"], expected: str, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        pytest.param(Verified(90, 0.0, "X"), "has 90 parameters, not 100", id="size"),
        pytest.param(Verified(100, 0.2, "X"), r"logits of .* differ by 0\.2; 0\.1 is allowed", id="logits"),
        pytest.param(Verified(100, float("nan"), "X"), "differ by nan", id="nan"),
        pytest.param(None, "does not load in a fresh process:\nboom", id="broken"),
    ],
)
def test_what_differs_is_said(found: Verified | None, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if found is None:
            return subprocess.CompletedProcess(command, 1, "", "boom")
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(asdict(found))}\n", "")

    monkeypatch.setattr(subprocess, "run", child)
    with pytest.raises(NotVerified, match=sentence):
        verify("somewhere", IDS, torch.zeros(1, 6, 61), 100, tolerance=0.1)
