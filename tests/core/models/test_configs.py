"""A config that no model can have is one sentence with file and key, at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from prunekit import WrongInput
from prunekit.models.configs import auto_class
from prunekit.models.opening import loaded, skeleton


@pytest.fixture(scope="module")
def folder(saved_tiny: Callable[..., Path]) -> Path:
    return saved_tiny()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", -64),
        ("hidden_size", "64"),
        ("hidden_size", None),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("hidden_act", "exec"),
        ("hidden_act", []),
        ("rope_parameters", {"rope_type": "evil"}),
        ("rope_parameters", {"rope_type": "yarn"}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0.0}),
        ("dtype", "os.system"),
        ("pad_token_id", 10**9),
        ("eos_token_id", "a"),
        ("head_dim", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "small"),
        ("model_type", ["llama"]),
        ("model_type", "nope"),
        ("id2label", 3),
        ("layer_types", 3),
        ("num_hidden_layers", 10**5),
        ("num_hidden_layers", 0),
        ("intermediate_size", 10**9),
        ("vocab_size", 10**12),
        ("num_labels", 10**7),
        ("output_attentions", True),
        ("return_dict", False),
    ],
)
def test_a_wrong_value_is_named_at_once(key: str, value: Any, folder: Path, tmp_path: Path) -> None:
    wrong = changed(folder, tmp_path, {key: value})
    began = time.monotonic()
    for door in (skeleton, loaded):
        with pytest.raises(WrongInput, match=rf"config\.json.*{key}") as caught:
            door(str(wrong))
        assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "NaN", '{"a":' * 100_000, "\xff\xfe", '{"vocab_size": ' + "9" * 5000 + "}"]
)
def test_what_is_no_config_names_the_file(text: str, folder: Path, tmp_path: Path) -> None:
    wrong = changed(folder, tmp_path, {})
    (wrong / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WrongInput, match=r"config\.json cannot be read: "):
        skeleton(str(wrong))


def test_a_model_far_larger_than_its_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"config\.json asks for [\d,]+ parameters, and the weights beside it have"):
        skeleton(str(changed(folder, tmp_path, {"intermediate_size": 4_000_000})))


def changed(folder: Path, place: Path, values: dict[str, Any]) -> Path:
    """A copy of a model whose config has other values."""
    config = json.loads((folder / "config.json").read_text()) | values
    for file in folder.iterdir():
        (place / file.name).symlink_to(file)
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    "model_type", ["llama", "prunekit_llama", "llava", "qwen2_5_vl", "prunekit_qwen2_5_vl", "mamba"]
)
def test_a_file_and_the_config_made_of_it_name_the_same_class(model_type: str) -> None:
    sizes = {"text_config": {"per_layer_config": {}}} if "vl" in model_type else {"per_layer_config": {}}
    config = AutoConfig.for_model(model_type, **(sizes if model_type.startswith("prunekit_") else {}))
    images = model_type.endswith(("llava", "vl"))
    wanted = AutoModelForImageTextToText if images else AutoModelForCausalLM
    assert auto_class(config) is auto_class({"model_type": model_type}) is wanted
    other = {"model_type": "unknown", "auto_map": {wanted.__name__: "code.Model"}}
    assert auto_class(other) is wanted


@pytest.mark.parametrize("values", [{}, {"model_type": []}, {"model_type": "llava-like", "auto_map": "none"}])
def test_what_says_nothing_is_opened_as_a_model_of_text(values: dict[str, Any]) -> None:
    assert auto_class(values) is AutoModelForCausalLM
