"""A pruned network as a transformers model: of a stock class where one can hold it, else of ours.

Layers that lost both parts are left out. If the others agree in size, the result needs no code of
prunekit; otherwise its config tells the size of every layer and `prunekit.modeling` builds it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from prunekit.adapters import ModelAdapter, Transformer
from prunekit.checkpoint import without_bars
from prunekit.modeling import BUNDLED, FAMILIES, Family, Part, UnequalLayers, define

Code = Literal["import", "bundled"]

# written anew by transformers, or true of the model before only
REWRITTEN = ("architectures", "auto_map", "dtype", "model_type", "per_layer_config", "transformers_version")


def to_transformers(model: PreTrainedModel, adapter: ModelAdapter) -> PreTrainedModel:
    """The model that `adapter` has cut, as an object of the right class, sharing its tensors."""
    blocks = adapter.blocks(model)
    if not isinstance(adapter, Transformer):  # nothing but single weights can be removed
        return _filled(type(model), copy.deepcopy(model.config), model, adapter.layers, range(len(blocks)))
    kept = [index for index, block in enumerate(blocks) if not _passes_through(adapter, block)] or [0]
    sizes = [adapter.layer_config(blocks[index]) for index in kept]
    values: dict[str, Any] = {key: value for key, value in model.config.to_dict().items() if key not in REWRITTEN}
    values |= {"num_hidden_layers": len(kept), "head_dim": adapter.head_dim(blocks[kept[0]])}
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][index] for index in kept]
    native = _native_biases(adapter.family, values)
    added = [[part for part in adapter.biased(blocks[index]) if part not in native] for index in kept]
    if any(added):
        sizes = [size | {"biased": parts} for size, parts in zip(sizes, added, strict=True)]
    config: Any = _stock_config(adapter.family, values, sizes)
    if config is None:
        config_class, _, causal = define(adapter.family)
        config = config_class(**values, per_layer_config=dict(enumerate(sizes)))
    else:
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config._attn_implementation = model.config._attn_implementation
    return _filled(causal, config, model, adapter.layers, kept)


def save(model: PreTrainedModel, directory: str | Path, tokenizer: Any = None, code: Code = "import") -> None:
    """Write what `to_transformers` made: config, safetensors, generation config and tokenizer files.

    `code` says how a model with unequal layers loads: after `import prunekit`, or by its bundled code
    with `trust_remote_code=True`. Stock models load anywhere and carry no code.

    Raises:
        FileExistsError: the directory holds a model; old weights next to new ones would be read.
    """
    if code not in get_args(Code):
        raise ValueError(f"code is {' or '.join(get_args(Code))}, not {code!r}")
    directory = Path(directory)
    if directory.is_dir() and any(directory.glob("*.safetensors")):
        raise FileExistsError(f"{directory} already holds a model; choose another directory or empty it")
    model.config.__dict__.pop("auto_map", None)
    if code == "bundled" and isinstance(model, UnequalLayers):
        if FAMILIES.get(model.family.model_type) is not model.family:
            raise ValueError(f"the code of {model.family.prefix} models is not prunekit's own: save with code='import'")
        autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        classes = (c.__name__ for c in define(model.family))
        model.config.auto_map = {auto: f"{BUNDLED}.{name}" for auto, name in zip(autos, classes, strict=True)}
    with without_bars():
        model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _passes_through(adapter: Transformer, block: nn.Module) -> bool:
    """Whether a block hands on what it gets: both parts dropped and no norm after the sum."""
    return len(adapter.dropped(block)) == 2 and adapter.family.has_norms_first(block)


def _native_biases(family: Family, values: dict[str, Any]) -> set[Part]:
    """The parts whose linear map with cut columns has a bias in the stock class."""
    one: dict[str, Any] = values | {"num_hidden_layers": 1}
    if one.get("layer_types"):
        one["layer_types"] = one["layer_types"][:1]
    config = CONFIG_MAPPING[family.model_type](**one)
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        stock = causal(config)
    (block,) = stock.base_model.get_submodule(family.layers)
    return {part for part, path in family.columns.items() if block.get_submodule(path).bias is not None}


def _stock_config(family: Family, values: dict[str, Any], sizes: Sequence[dict[str, Any]]) -> PreTrainedConfig | None:
    """The config of a stock class that can hold layers of these sizes, if there is one."""
    first = sizes[0]
    if {"skip", "biased"} & first.keys() or any(size != first for size in sizes):
        return None
    heads, hidden = first[family.query_heads], values["hidden_size"]
    if not family.free_head_dim and heads * values["head_dim"] != hidden:
        return None
    values, model_type = values | first, family.model_type
    if model_type == "llama" and hidden % heads:  # which the validator of Llama forbids, and Mistral's does not
        if values.pop("attention_bias") or values.pop("mlp_bias"):
            return None
        values.pop("pretraining_tp", None)
        values["sliding_window"], model_type = None, "mistral"
    return CONFIG_MAPPING[model_type](**values)


def _filled(
    causal: type[PreTrainedModel], config: PreTrainedConfig, model: PreTrainedModel, layers: str, kept: Sequence[int]
) -> PreTrainedModel:
    """A model of class `causal` with the tensors of `model`; layer i is layer kept[i] of `model`."""
    with torch.device("meta"):
        small = causal(config)
    origin = {f"{layers}.{new}.": f"{layers}.{old}." for new, old in enumerate(kept)}

    def theirs(name: str) -> str:
        prefix = next((prefix for prefix in origin if name.startswith(prefix)), "")
        return origin.get(prefix, "") + name.removeprefix(prefix)

    state = model.state_dict()
    small.load_state_dict({name: state[theirs(name)] for name in small.state_dict()}, assign=True)
    for path, module in small.named_modules():
        absent = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name, buffer in absent:  # rotary tables are not in the state
            table = model.get_buffer(f"{path}.{name}").to(buffer.dtype, copy=True)
            setattr(module, name, nn.Buffer(table, persistent=False))
        if absent:
            small._init_weights(module)  # anew: `model.to(torch.bfloat16)` would have rounded them
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    small.config.dtype = model.dtype
    return small.train(model.training)
