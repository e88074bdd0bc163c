"""What models write: the likeliest tokens, side by side, and how much of it repeats."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import prunekit
from prunekit.cli.main import app
from prunekit.measure.samples import GRAM, PROMPTS, repeated, samples
from prunekit.report.card import card
from prunekit.run import session
from prunekit.run.plan.plan import Stage
from prunekit.system.memory import Shares


@pytest.mark.parametrize(
    ("ids", "share"), [([], 0.0), ([1, 2], 0.0), ([1, 2, 3, 4, 5], 0.0), ([7] * 12, 0.9), ([1, 2, 3, 1, 2, 3], 0.25)]
)
def test_runs_that_were_there_before_are_counted(ids: list[int], share: float) -> None:
    assert GRAM == 3
    assert repeated(ids) == pytest.approx(share)


def test_every_token_is_the_likeliest_after_those_before_it(saved_tiny: Any) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(saved_tiny())
    model.generation_config.temperature = 0.7  # as many models come; greedy has none
    tokenizer = AutoTokenizer.from_pretrained(saved_tiny())
    found = samples(model, tokenizer, PROMPTS[:2], tokens=6)
    for sample, prompt in zip(found, PROMPTS, strict=False):
        ids = tokenizer.encode(prompt)
        start = len(ids)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == model.generation_config.eos_token_id:
                    break
        assert sample.prompt == prompt
        assert sample.text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_a_report_and_its_card_have_what_both_have_written(saved_tiny: Any, quick: Any, tmp_path: Path) -> None:
    folder = saved_tiny()
    report = prunekit.prune(folder, output=tmp_path / "out", samples=2, verify=False, **quick()).report
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    written = samples(again, tokenizer, PROMPTS[:2])
    assert [one["prompt"] for one in report["samples"]] == list(PROMPTS[:2])
    assert [one["pruned"] for one in report["samples"]] == [sample.text for sample in written]
    assert [one["dense"] for one in report["samples"]] != [sample.text for sample in written]
    assert PROMPTS[1] in (tmp_path / "out" / "README.md").read_text()
    assert "sample" in report["seconds"]


def test_text_cannot_leave_its_place_in_the_card(saved_tiny: Any, quick: Any) -> None:
    result = prunekit.prune(saved_tiny(), samples=1, **quick())
    wild = "fine\n\n# Title\n```\n<script>\x1b[31m\u202e [a](b)"
    for who in ("dense", "pruned"):
        result.report["samples"][0][who] = wild
    text = card(result.report, result.recipe, {})
    lines = [line for line in text.splitlines() if "script" in line]
    assert len(lines) == 2
    assert all(line.startswith("    ") for line in lines)
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_a_model_that_is_read_block_by_block_writes_nothing(
    saved_tiny: Any, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = session.planned

    def tight(*args: Any, **options: Any) -> Any:
        return replace(
            plan(*args, **options), stages=(Stage("open", 0),), shares=Shares(0, 0, 0, 0, 0, 0), limit=1 << 30
        )

    monkeypatch.setattr(session, "planned", tight)
    report = prunekit.prune(saved_tiny(), output=tmp_path / "out", samples=1, verify=False, **quick()).report
    assert "samples" not in report


@pytest.mark.slow
def test_evaluate_prints_them(saved_tiny: Any) -> None:
    asked = ["evaluate", str(saved_tiny()), "--tokens", "256", "--seqlen", "32", "--samples", "2", "--quiet"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0
    assert all(prompt in told.output for prompt in PROMPTS[:2])
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert [sample["prompt"] for sample in found["samples"]] == list(PROMPTS[:2])
