"""Released code beside ours, with folders that stand in for it."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from prunekit.data.draws import draw
from prunekit.data.spec import DataSpec
from prunekit.models.opening import opened

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STANDS_IN = """
import os
import torch

def prune_flap(args, model, tokenizer, device):
    rows, _ = get_loaders("anything", nsamples=args.nsamples, seed=args.seed, seqlen=model.seqlen, tokenizer=tokenizer)
    assert len(rows) == args.nsamples and rows[0][0].shape == (1, model.seqlen)
    hidden = model.model.embed_tokens(rows[0][0])
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=torch.arange(model.seqlen)[None])
        mlp, kept = layer.mlp, round(layer.mlp.gate_proj.weight.shape[0] * (1 - args.pruning_ratio))
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.data = linear.weight.data[:kept]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :kept]

def prune_wanda_sp(args, model, tokenizer, device):
    os._exit(3)
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("peers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("released")
    (path / "lib").mkdir()
    (path / "lib" / "prune.py").write_text(STANDS_IN)
    return path


@pytest.fixture
def job(peers, saved_tiny):
    """On a model without grouped heads."""
    grouped = saved_tiny()
    data = DataSpec(
        dataset="python-docs", seqlen=64, calibration_tokens=2048, search_tokens=2048, evaluation_tokens=2048
    )
    whole = peers.ungrouped(str(grouped), str(grouped.parent / "ungrouped"))
    return peers.Job(whole, draw(opened(whole).tokenizer, data), 0.5)


def test_a_model_without_groups_is_the_same_function(peers, saved_tiny, tmp_path):
    grouped = saved_tiny()
    model, whole = (opened(str(path)).model for path in (grouped, peers.ungrouped(str(grouped), str(tmp_path))))
    ids = torch.arange(32)[None]
    assert model.config.num_key_value_heads < whole.config.num_key_value_heads == whole.config.num_attention_heads
    torch.testing.assert_close(whole(ids).logits, model(ids).logits)


def test_a_peer_gets_our_tokens_and_is_counted_in_its_tensors(peers, job, folder):
    dense, found = peers.dense(job), peers.theirs(job, "flap", folder)
    config = opened(job.model).model.config
    gone = config.intermediate_size - round(config.intermediate_size * 0.5)
    fewer = (3 * gone - 2) * config.hidden_size * config.num_hidden_layers  # two biases are added
    assert found["blocks"] == found["blocks_whole"] == dense["blocks"] - fewer
    assert found["label"] == dense["label"]
    assert found["perplexity"] != dense["perplexity"]
    assert found["tokens"] == 2048


def test_zeros_stay_in_the_tensors_and_are_told_apart(peers, job):
    model = opened(job.model).model
    before, hidden = peers.counted(model), model.config.hidden_size
    model.model.layers[0].mlp.down_proj.weight.data[:, 3] = 0
    after = peers.counted(model)
    assert after["blocks"] == before["blocks"]
    assert after["blocks_whole"] == before["blocks_whole"] - 3 * hidden


def test_grouped_heads_are_refused_where_the_code_knows_none(peers, job, folder, saved_tiny):
    grouped = peers.Job(str(saved_tiny()), job.draws, 0.5)
    with pytest.raises(peers.Refused, match="no grouped heads"):
        peers.theirs(grouped, "flap", folder)


@pytest.mark.slow
def test_a_peer_that_ends_its_process_is_a_row_that_says_so(peers, job, folder):
    assert "BrokenProcessPool" in peers.alone(peers.theirs, job, "wanda-sp", folder)["failed"]


@pytest.mark.slow
def test_the_script_writes_rows_once_and_a_table(job, folder, tmp_path):
    command = [sys.executable, BENCHMARKS / "peers.py", job.model, "--flap", folder, "--wanda-sp", folder]
    command += ["--sparsity", "0.5", "--tokens", "2048", "--evaluation-tokens", "2048", "--seqlen", "64"]
    command += ["--rows", tmp_path / "rows.jsonl"]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["name"], row.get("beside")) for row in rows] == [
        ("dense", None), ("flap", None), ("fast", "flap"), ("same", "flap"), ("wanda-sp", None), ("fast", None)
    ]  # fmt: skip
    dense, flap, ours, _, failed, _ = rows
    assert ours["blocks"] <= flap["blocks"] < dense["blocks"]
    assert ours["tokens"] <= flap["tokens"]
    assert f"| Wanda-sp | did not run: {failed['failed']} |" in table
    subprocess.run(command, check=True, capture_output=True)
    again = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in again[len(rows) :]] == ["wanda-sp"]  # only what failed
