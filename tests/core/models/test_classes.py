"""The model classes whose layers differ in size, without any pruning around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prunekit.models import classes as modeling
from prunekit.testing.models import COMMON, SIZES

modeling.register()


def config_of(model_type: str, layers: dict[int, dict[str, Any]], **overrides: Any) -> Any:
    values = COMMON | SIZES[model_type] | ({} if model_type == "falcon" else {"head_dim": 4}) | overrides
    return AutoConfig.for_model(f"prunekit_{model_type}", **values, per_layer_config=layers)


@pytest.mark.parametrize("model_type", SIZES)
def test_a_model_is_built_and_initialized_from_its_config(model_type: str) -> None:
    family = modeling.FAMILIES[model_type]
    heads = 6 if model_type == "olmo2" else 3  # whose norms are over all of them
    layers: dict[int, dict[str, Any]] = {1: {family.width: 500, "num_attention_heads": heads}, 2: {"skip": ["mlp"]}}
    config = config_of(model_type, layers)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is getattr(modeling, f"Prunekit{family.prefix}ForCausalLM")
    linear = model.base_model.get_submodule(f"{family.layers}.1.{family.columns['mlp']}")
    assert linear.in_features == 500
    assert abs(linear.weight.std().item() - 0.3) < 0.03  # as the config asks, not as nn.Linear starts
    assert "allow_global_per_layer_attribute_access" not in model.config.__dict__
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert copy.deepcopy(config).to_dict() == config.to_dict()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_layer_may_have_biases_its_stock_class_has_not(model_type: str) -> None:
    layers: dict[int, dict[str, Any]] = {0: {"biased": ["attention", "mlp"]}, 1: {"biased": []}, 2: {"biased": ["mlp"]}}
    model = AutoModelForCausalLM.from_config(config_of(model_type, layers))
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    expected = ["0.self_attn.o_proj", "0.mlp.down_proj", "2.mlp.down_proj"]
    assert set(biases) == {f"model.layers.{path}.bias" for path in expected}
    assert not any(p.any() for p in biases.values())  # as transformers starts biases
    with pytest.raises(Exception, match="layer 0: biased lists attention and mlp, not q"):
        config_of(model_type, {i: {"biased": ["q"]} for i in range(3)})


@pytest.mark.parametrize(
    ("model_type", "layer", "sentence"),
    [
        pytest.param("llama", {"num_attention_heads": 4}, "layer 1: 4 query heads do not share 3 KV heads", id="heads"),
        pytest.param("opt", {"num_attention_heads": 0}, "layer 1: 0 query heads", id="no heads"),
        pytest.param(
            "gpt_neox", {"intermediate_size": 0}, r"layer 1: intermediate_size is 0; .* skip: \[mlp\]", id="width"
        ),
        pytest.param("qwen3", {"skip": ["norm"]}, "layer 1: skip lists attention and mlp, not norm", id="skip"),
    ],
)
def test_impossible_layers_are_refused(model_type: str, layer: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):  # transformers wraps what validators raise
        config_of(model_type, {1: layer})


@pytest.mark.parametrize(
    ("model_type", "patch", "sentence"),
    [
        ("llama", -1, "layer 0: patch is the rank of a linear map beside the MLP, not -1"),
        ("llama", "2", "layer 0: patch is the rank of a linear map beside the MLP, not '2'"),
        ("opt", 2, "layer 0: patch is 2, and OPT has no MLP of its own to stand beside"),
    ],
)
def test_maps_beside_mlps_that_cannot_be_are_refused(model_type: str, patch: Any, sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        config_of(model_type, {i: {"patch": patch} for i in range(3)})


def test_a_dropped_mlp_has_no_map_beside_it() -> None:
    layers = {0: {"patch": 2, "skip": ["mlp"]}, 1: {"patch": 2, "skip": []}, 2: {"patch": 0, "skip": []}}
    model = AutoModelForCausalLM.from_config(config_of("llama", layers))
    there = {name: tuple(p.shape) for name, p in model.named_parameters() if "patch" in name}
    assert there == {"model.layers.1.mlp.patch.v.weight": (2, 24), "model.layers.1.mlp.patch.u.weight": (24, 2)}


def test_registering_twice_is_harmless_and_classes_are_made_once() -> None:
    modeling.register()
    assert modeling.define(modeling.FAMILIES["llama"])[2] is modeling.PrunekitLlamaForCausalLM  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="PrunekitBloomModel"):
        _ = modeling.PrunekitBloomModel  # type: ignore[attr-defined]


def test_norms_are_tuples_of_names() -> None:
    with pytest.raises(TypeError, match=r"norms of X are tuples of names, so \('norm',\) and not 'norm'"):
        modeling.llama_like("x", "X", norms={"attention": "norm", "mlp": ()})


def test_a_skipped_layer_keeps_the_cache_in_step() -> None:
    lengths: list[tuple[int, ...]] = []

    class Cache:
        def update(self, keys: torch.Tensor, values: torch.Tensor, index: int) -> None:
            lengths.append((*keys.shape, index))

    hidden = torch.ones(2, 5, 24)
    out, weights = modeling.SkippedMixer(index=3, head_dim=4)(hidden, past_key_values=Cache())
    assert not out.any()
    assert weights is None
    modeling.SkippedMixer(index=3, head_dim=4)(hidden, layer_past=Cache())
    assert lengths == [(2, 1, 5, 1, 3)] * 2  # no wider than a length takes
