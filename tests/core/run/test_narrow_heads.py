"""Heads that stay and get narrower, through a run: exact prices, classes that load, the same bytes after a kill."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit import WrongInput
from prunekit.data.spec import DataSpec
from prunekit.measure.evaluate import evaluate
from prunekit.models.classes import LowRank, NarrowHeads, Patched
from prunekit.run.export import export_model
from prunekit.search.store import CandidateStore
from prunekit_strategies.exporters.vllm import VLLM


@pytest.fixture(scope="module")
def folder(saved_tiny):
    return saved_tiny(torch.bfloat16, intermediate_size=48)


@pytest.fixture(scope="module")
def pruned(quick):
    """A run of the recipe `olica`."""

    def run(folder, output, **changes):
        options = {
            key: value for key, value in quick().items() if key.partition("__")[0] not in ("pruner", "allocator")
        }
        recipe: dict[str, Any] = {"recipe": "olica", "objective": "expected-error"}
        recipe |= {} if "target" in changes else {"sparsity": 0.4}
        return prunekit.prune(folder, output=output, **options | recipe | changes)

    return run


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory, pruned):
    """Of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    pruned(folder, output, verify=False)
    return output


@pytest.mark.slow
def test_a_fresh_process_loads_it_by_the_code_that_it_carries(folder, tmp_path, pruned):
    pruned(folder, tmp_path / "out", code="bundled", verify=True)  # else it raises
    assert (tmp_path / "out" / "modeling_prunekit.py").exists()


def test_the_budget_is_met_to_the_unit_and_classes_of_ours_hold_what_is_left(folder, result):
    report = json.loads((result / "report.json").read_text())
    small, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (result, folder))
    left, whole = (sum(p.numel() for p in model.model.layers.parameters()) for model in (small, dense))
    (patch,) = [finisher["parameters_added"] for finisher in report["finishers"]]
    assert left == report["pruned"]["block_parameters"]
    assert patch > 0
    spent, limit = report["budget"]["spent"], report["budget"]["limit"]
    assert spent <= limit
    cheapest = min(site["parameters"] // site["kept"] for site in report["sites"])
    assert 0 <= 0.6 * whole - left < cheapest, "never more than asked, and not another neuron would fit"
    for block in small.model.layers:
        assert isinstance(block.self_attn.q_proj, LowRank)
        assert isinstance(block.self_attn.o_proj, NarrowHeads)
    assert any(isinstance(block.mlp, Patched) for block in small.model.layers)
    by_kind = {"q_proj": [], "o_proj": [], "down_proj": []}
    for site in report["sites"]:
        by_kind.get(site["name"].rpartition(".")[2], []).append(site["kept"] / site["groups"])
    assert max(by_kind["q_proj"]) < min(by_kind["down_proj"]) < min(by_kind["o_proj"])
    sizes = json.loads((result / "config.json").read_text())["per_layer_config"]
    assert {size["values"] for size in sizes.values()} == {3}  # of 4
    assert all({"self_attn.q_proj", "self_attn.k_proj"} == size["ranks"].keys() for size in sizes.values())


def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, result, tmp_path, killed_at, pruned):
    with killed_at(CandidateStore, "put", 7):
        pruned(folder, tmp_path / "out", verify=False)
    pruned(folder, tmp_path / "out", verify=False)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (result / file).read_bytes(), file


def test_what_is_loaded_is_what_was_judged(result):
    small: Any = AutoModelForCausalLM.from_pretrained(result)
    ids = torch.arange(20)[None]
    data = DataSpec(dataset=str(result / "README.md"), evaluation_tokens=64, seqlen=32)
    report, found = json.loads((result / "report.json").read_text()), evaluate(str(result), data)
    assert found["parameters"] == report["pruned"]["parameters"]
    with torch.no_grad():
        cached = small.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
        plain = small.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(cached, plain)


def test_formats_without_narrower_heads_are_refused_of_a_folder_too(result, tmp_path):
    with pytest.raises(WrongInput, match="format 'vllm' does not know structure values; it knows groups, low-rank"):
        export_model(str(result), [VLLM()], tmp_path / "vllm")


def test_a_model_with_narrower_heads_is_not_pruned_again(result, tmp_path, pruned):
    with pytest.raises(WrongInput, match="LowRank; prune before quantizing, factoring or wrapping"):
        pruned(result, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruner": "wanda"}, "pruner 'wanda' does not know the narrower heads that heads: narrow makes"),
        ({"finishers": "bias"}, "finisher 'bias' does not know the narrower heads"),
        ({"exporters": "gguf"}, "exporter 'gguf' does not know the narrower heads"),
        ({"exporters": "onnx"}, "exporter 'onnx' does not know the narrower heads"),
        ({"exporters": "vllm"}, "exporter 'vllm' does not know the narrower heads"),
        ({"allocator": "global-rank"}, "allocator 'global-rank' ranks groups, of which heads have none"),
        ({"width": "minitron"}, "heads: narrow and width do not go together yet"),
        ({"structure": "low-rank"}, "heads: narrow goes with structure groups, not low-rank"),
        ({"target": "kv-cache=0.5"}, "structure values frees nothing in kv-cache"),
        ({"target": "latency=0.5"}, "latency goes with structure groups"),
    ],
)
def test_what_does_not_go_with_narrower_heads_is_refused_before_any_work(folder, tmp_path, pruned, changes, message):
    finishers = {} if "exporters" in changes or "finishers" in changes else {"finishers": []}
    with pytest.raises(WrongInput, match=message):
        pruned(folder, tmp_path / "out", **finishers | changes)
    assert not list(tmp_path.iterdir())
