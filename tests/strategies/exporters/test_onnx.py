"""The graph that is written computes what transformers computes, with whatever is cached and wherever it is padded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import prunekit as pk
from prunekit.export import to_transformers
from prunekit.export.compare import compare
from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.space.sites import Site
from prunekit.testing import tiny
from prunekit.testing.exporters import record_of
from prunekit.testing.models import EXPERTS, SIZES
from prunekit_strategies.exporters import onnx as onnx_exporter
from prunekit_strategies.exporters.onnx import MODEL, ONNX, _halve, _nodes, _opened, _scanned

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXACT = 1e-4  # nats
IDS = torch.randint(61, (3, 60), generator=torch.Generator().manual_seed(0))  # 180 positions
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in SIZES | EXPERTS},
    "mistral-sliding": ("mistral", {"sliding_window": 4}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}


def extremes(site: Site) -> int:
    """Attention of the first layer and MLP of the last are dropped; KV heads and widths differ."""
    if site.kind == "experts":  # of which a token selects two
        return 2 + site.block
    counts = {(0, "attention"): 0, (0, "mlp"): 7, (1, "attention"): 1, (1, "mlp"): 1, (2, "mlp"): 0}
    return max(site.least, counts.get((site.block, site.kind), max(1, site.n_groups - 1)))


def pruned(model_type: str, keep: Callable[[Site], int] = extremes, **overrides: Any) -> Any:
    model, adapter = tiny(model_type, **overrides), adapter_for(model_type)
    for site in adapter.sites(model):
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
        adapter.remove(model, site, Candidate(tuple(range(keep(site))), weight))
    return to_transformers(model.float(), adapter).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with tied weights, layers without attention and without MLP, and its graph."""
    model, path = pruned("qwen2"), tmp_path_factory.mktemp("onnx") / "onnx"
    before = model.config._attn_implementation
    ONNX().write(pk.Product(model), path)
    assert model.config._attn_implementation == before
    return model, path


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(ids, use_cache=False, **more).logits


def test_logits_are_those_of_the_model_whole_and_step_by_step(written: tuple[Any, Path]) -> None:
    model, path = written
    session, expected = _opened(path), logits(model, IDS)
    whole, _ = session.step(IDS.numpy(), session.empty(3))
    assert float((torch.from_numpy(whole) - expected).abs().max()) <= EXACT
    past, parts = session.empty(3), []
    for ids in IDS.split([20, 1, 1, 30, 8], dim=1):
        part, past = session.step(ids.numpy(), past)
        parts.append(torch.from_numpy(part))
    assert float((torch.cat(parts, 1) - expected).abs().max()) <= EXACT
    alone, _ = session.step(IDS[:1].numpy(), session.empty(1))
    assert float((torch.from_numpy(alone) - expected[:1]).abs().max()) <= EXACT


@pytest.mark.slow
def test_padding_on_the_left_changes_nothing(written: tuple[Any, Path]) -> None:
    model, path = written
    session, text = _opened(path), IDS[:1, :9]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), text], 1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 9)], 1).long()
    given = {"input_ids": padded.numpy(), "attention_mask": mask.numpy()}
    given |= {name: each for (name, _, _), each in zip(session.past, session.empty(1), strict=True)}
    found = torch.from_numpy(session.session.run(None, given)[0])[:, 4:]
    assert float((found - logits(model, text)).abs().max()) <= EXACT


def test_only_layers_with_attention_have_a_cache_each_of_its_own_size(written: tuple[Any, Path]) -> None:
    _, path = written
    graph = onnx.load(path / MODEL).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "new"],
        "attention_mask": ["batch", "total"],
        "logits": ["batch", "new", 61],
        **{f"past.1.{what}": ["batch", 1, "past", 4] for what in ("key", "value")},
        **{f"past.2.{what}": ["batch", 2, "past", 4] for what in ("key", "value")},
        **{f"present.1.{what}": ["batch", 1, "total", 4] for what in ("key", "value")},
        **{f"present.2.{what}": ["batch", 2, "total", 4] for what in ("key", "value")},
    }


def test_weights_are_stored_once_and_nothing_of_this_machine_is(written: tuple[Any, Path]) -> None:
    model, path = written
    parameters = sum(p.numel() for p in model.parameters())
    graph = onnx.load(path / MODEL).graph
    assert parameters == sum(math.prod(each.dims) for each in graph.initializer)
    constants = [node.output[0] for node in graph.node if node.op_type == "Constant"]
    assert "model.model.rotary_emb.inv_freq" in constants  # which is no weight
    assert str(Path(__file__).parents[3]).encode() not in (path / MODEL).read_bytes()


@pytest.mark.slow
def test_onnxruntime_answers_what_the_judged_network_does(written: tuple[Any, Path]) -> None:
    model, path = written
    probe = pk.Probe(IDS, logits(model, IDS), sum(p.numel() for p in model.parameters()))
    record = record_of(pk.Product(model), probe)
    rows = compare(record, ONNX().answers(path, record.inquiry), ONNX().tolerance(path))
    assert [row.what for row in rows if row.agrees is not True] == []
    assert ONNX().tolerance(path) == EXACT
    prompt, greedy = record.inquiry.prompt[None], {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, **greedy)
    assert torch.equal(made[0, prompt.shape[1] :], record.continuation)
    ONNX().verify(path, probe)
    with pytest.raises(pk.NotVerified, match=r"log-probabilities of .* differ"):
        ONNX().verify(path, pk.Probe(IDS, -probe.logits, probe.parameters))
    with pytest.raises(pk.NotVerified, match="parameters, not 1"):
        ONNX().verify(path, pk.Probe(IDS, probe.logits, 1))


@pytest.mark.slow
def test_weights_in_float16_are_rounded_once_and_computed_with_in_float32(
    written: tuple[Any, Path], tmp_path: Path
) -> None:
    model, path = written
    graph = onnx.load(path / MODEL)
    _halve(graph)
    onnx.save(graph, tmp_path / MODEL)
    stored = {each.name.removesuffix(".half"): each.name.endswith(".half") for each in graph.graph.initializer}
    matrices = [stored.get(f"model.{n}") for n, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1]
    assert matrices.count(True) == len(matrices) - 1  # of the two names of a tied tensor, one
    assert not any(stored.get(f"model.{name}") for name, p in model.named_parameters() if p.dim() == 1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float() if parameter.dim() > 1 else parameter)
        expected = logits(model, IDS)
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    session = _opened(tmp_path)
    assert float((torch.from_numpy(session.step(IDS.numpy(), session.empty(3))[0]) - expected).abs().max()) <= EXACT
    sizes = [(folder / MODEL).stat().st_size for folder in (tmp_path, path)]
    assert sizes[0] < sizes[1] - 1.2 * sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_values_that_float16_cannot_hold_are_refused(written: tuple[Any, Path]) -> None:
    graph = onnx.load(written[1] / MODEL)
    each = next(each for each in graph.graph.initializer if len(each.dims) > 1)
    each.raw_data = np.full(math.prod(each.dims), 1e6, np.float32).tobytes()
    with pytest.raises(pk.WrongInput, match="holds values that float16 cannot; take --dtype float32"):
        _halve(graph)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_one_after_the_other_add_up_to_what_the_model_computes(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_turn(step: Any, total: torch.Tensor, stacks: tuple[torch.Tensor, ...]) -> torch.Tensor:  # what Scan does
        for each in zip(*stacks, strict=True):
            total, _ = step(total, each)
        return total

    monkeypatch.setattr(onnx_exporter, "_scan", in_turn)
    model = pruned(model_type)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_proj_bias"):  # of experts, which are zeros in new models
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    expected = logits(model, IDS)
    before = [module for module in model.modules() if "forward" in vars(module)]
    with _scanned(model):
        inside = [module for module in model.modules() if "forward" in vars(module)]
        found = logits(model, IDS)
    assert len(inside) > len(before)  # else this is the same computation twice
    assert [module for module in model.modules() if "forward" in vars(module)] == before
    assert float((found - expected).abs().max()) <= EXACT


@pytest.mark.slow
def test_a_graph_is_as_large_for_many_experts_as_for_few(tmp_path: Path) -> None:
    sizes = list[int]()
    for experts in (3, 24):
        model, path = tiny("qwen3_moe", num_experts=experts, num_local_experts=experts).float(), tmp_path / f"{experts}"
        ONNX().write(pk.Product(model), path)
        graph = onnx.load(path / MODEL)
        sizes.append(sum(1 for part in (graph.graph, *graph.functions) for _ in _nodes(part)))
        session = _opened(path)
        for ids in (IDS, IDS[:1, :1]):  # one token selects two experts, and the others get no row
            found = torch.from_numpy(session.step(ids.numpy(), session.empty(len(ids)))[0])
            assert float((found - logits(model, ids)).abs().max()) <= EXACT
        assert str(Path(__file__).parents[3]).encode() not in (path / MODEL).read_bytes()
    assert abs(sizes[1] - sizes[0]) <= 2  # constants that are equal by chance are one


@pytest.mark.parametrize(
    ("model_type", "changes", "sentence"),
    [
        pytest.param("llama", {"rope_type": "dynamic", "factor": 2.0}, "cannot hold dynamic rotary tables", id="rope"),
        pytest.param("falcon", {"alibi": True}, "cannot hold ALiBi", id="alibi"),
        pytest.param("mamba", {}, "writes models with attention, not Mamba", id="mamba"),
    ],
)
def test_what_no_graph_can_hold_is_refused_before_any_work(
    model_type: str, changes: dict[str, Any], sentence: str
) -> None:
    rope = {"rope_parameters": {"rope_theta": 1e4, **changes}} if "rope_type" in changes else changes
    config = AutoConfig.for_model(model_type, **rope)
    with pytest.raises(pk.WrongInput, match=sentence):
        ONNX().check(pk.Order(adapter_for(model_type), "groups", "import", config=config))


def rounding(model: Any) -> float:
    """Nats by which float32 moves the model itself.

    Where one neuron is left and a norm stands behind it, as in Gemma, the neuron's sign decides, and that of a value
    near zero is a matter of rounding: there it is 3e-4, elsewhere 1e-5 and less.
    """
    exact = logits(copy.deepcopy(model).double(), IDS).log_softmax(-1)
    return float((logits(model, IDS).log_softmax(-1) - exact).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_answers_the_same(variant: str, tmp_path: Path) -> None:
    model_type, overrides = VARIANTS[variant]
    model = pruned(model_type, **overrides)
    order = pk.Order(adapter_for(model_type), "groups", "import", config=model.config)
    ONNX().check(order)
    ONNX().write(pk.Product(model), tmp_path / "onnx")
    record = record_of(pk.Product(model), pk.Probe(IDS, logits(model, IDS), sum(p.numel() for p in model.parameters())))
    rows = compare(record, ONNX().answers(tmp_path / "onnx", record.inquiry), max(EXACT, 10 * rounding(model)))
    assert [row for row in rows if row.agrees is not True] == []
