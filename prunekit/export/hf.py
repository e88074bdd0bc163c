"""A pruned network as a transformers model: of a stock class where one can hold it, else of ours.

Layers that lost both parts are left out. If the others agree in size, the result needs no code of
prunekit; otherwise its config tells the size of every layer and `prunekit.modeling` builds it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion

from prunekit.layer.layouts import layout_of
from prunekit.models.adapters.transformer import PARTS, Transformer
from prunekit.models.classes import BUNDLED, FAMILIES, Family, Part, UnequalLayers, define, define_heads
from prunekit.models.modules import shallow, take_tables, text_config
from prunekit.models.opening import stored_as, without_bars
from prunekit.models.paging import attach, pager_of, real, shapes_of
from prunekit.models.shards import SHARD_BYTES, write
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.exporter import Code
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.system.files import write_json

# written anew by transformers, or true of the model before only
REWRITTEN = ("architectures", "auto_map", "dtype", "model_type", "per_layer_config", "transformers_version")


def to_transformers(model: PreTrainedModel, adapter: ModelAdapter) -> PreTrainedModel:
    """Make a model that `adapter` has cut an object of the right class, which shares its tensors."""
    blocks, kept = adapter.blocks(model), _kept(model, adapter)
    if not isinstance(adapter, Transformer):  # nothing but single weights can be removed
        return _filled(type(model), copy.deepcopy(model.config), model, adapter.layers, kept)
    own, family = text_config(model.config), adapter.family_of(model.config)
    sizes = [adapter.layer_config(blocks[index]) for index in kept]
    attention = next((blocks[index] for index in kept if family.there(blocks[index], "attention")), None)
    head_dim = None if attention is None else adapter.head_dim(attention)
    values: dict[str, Any] = {key: value for key, value in own.to_dict().items() if key not in REWRITTEN}
    values |= {"num_hidden_layers": len(kept), **family.plain}
    follows = isinstance(getattr(type(own), "head_dim", None), property)  # from the rest
    if head_dim is not None and not follows:
        values["head_dim"] = head_dim
    for key in family.by_layer:
        if values.get(key):
            values[key] = [values[key][index] for index in kept]
    if family.experts is not None or family.mixer is not None:  # a size that a block has not is that of the others
        first = {key: value for size in reversed(sizes) for key, value in size.items() if key != "skip"}
        fixed = {} if family.mixer is None else family.mixer.fixed(values)
        if all(size.get(key, count) == count for size in sizes for key, count in fixed.items()):
            first, *sizes = ({k: v for k, v in size.items() if k not in fixed} for size in (first, *sizes))
        sizes = [first | size for size in sizes]
    if family.experts is not None and len(kept) < len(blocks) and "mlp_only_layers" in values:
        # blocks with a plain MLP are told by their number
        plain = [new for new, old in enumerate(kept) if not family.experts.there(blocks[old])]
        values |= {"mlp_only_layers": plain, "decoder_sparse_step": 1}
    native = _native_biases(family, values)
    added = [[part for part in adapter.biased(blocks[index]) if part not in native] for index in kept]
    if any(added):
        sizes = [size | {"biased": parts} for size, parts in zip(sizes, added, strict=True)]
    for key, found_in in (("ranks", adapter.ranks), ("values", adapter.value_width), ("patch", adapter.patch_rank)):
        found = [found_in(blocks[index]) for index in kept]
        if any(found):
            sizes = [size | {key: each} for size, each in zip(sizes, found, strict=True)]
    stock = _stock_config(family, values, sizes, head_dim)
    config, causal = _language_model(family, stock, values, sizes)
    if own is not model.config:  # the language model is a part of another, which stays
        config, causal = _around(model.config, family, config, stock=stock is not None)
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    for part in config.sub_configs:
        getattr(config, part)._attn_implementation = getattr(model.config, part)._attn_implementation
    return _filled(causal, config, model, adapter.layers, kept)


def _language_model(family: Family, stock: Any, values: dict[str, Any], sizes: list[dict[str, Any]]) -> tuple[Any, Any]:
    """(config, class) of a language model, the stock ones where `stock` is given; no class of what is only a part."""
    if stock is not None:
        return stock, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(stock), None)
    if family.experts is not None:  # engines read one number of neurons for the experts of all layers
        width = family.experts.width
        values = values | ({width: sizes[0][width]} if len({size[width] for size in sizes}) == 1 else {})
    layers: Any = values | {"per_layer_config": dict(enumerate(sizes))}
    if family.text is not None:
        return CONFIG_MAPPING[family.text](**layers), None
    config, _, causal = define(family)
    return config(**layers), causal


def _around(config: Any, family: Family, text: Any, *, stock: bool) -> tuple[Any, Any]:
    """(config, class) of a model of images and text around a language model; `stock`: of the stock class."""
    ours = not stock and family.text is not None  # else it takes whatever language model the config names
    outer: Any = define(family)[0] if ours else CONFIG_MAPPING[config.model_type.removeprefix("prunekit_")]
    values = {key: value for key, value in config.to_dict().items() if key not in (*REWRITTEN, "text_config")}
    causal = define(family)[2] if ours else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[outer]
    return outer(**values, text_config=text), causal


def paged(net: Supernet, plan: Allocation, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Make the model of an allocation over a paged one, itself paged: every block is cut when it is read.

    What `to_transformers` makes of `net.assemble(plan)`, and no more than two blocks of it in memory.
    """
    adapter, dense = net.adapter, net.model
    with shapes_of(dense):
        shape = shallow(dense)
        for site, count in zip(net.space.sites, plan, strict=True):
            weight = torch.empty_like(adapter.linear(net.blocks[site.block], site).weight, device="meta")
            adapter.remove(shape, site, layout_of(site).stand_in(site, count, weight))
        small = to_transformers(shape, adapter)
        kept = _kept(shape, adapter)
    attach(small, adapter, _Cut(net, plan, kept, dtype).read, dtype, bound=0, devices=[device])
    small.config.dtype = dtype
    for module in small.modules():
        for name, table in list(module.named_buffers(recurse=False)):
            setattr(module, name, nn.Buffer(table.to(device), persistent=False))
    return small.requires_grad_(False)


@dataclass
class _Cut:
    """Parameters of an allocation's model by its names; those of one block are cut together."""

    net: Supernet
    plan: Allocation
    kept: Sequence[int]  # the dense block of every block
    dtype: torch.dtype
    block: str = ""
    left: dict[str, Tensor] = field(default_factory=dict)  # of that block, not yet read

    def read(self, name: str, device: torch.device) -> Tensor:
        inside = name.removeprefix(f"{self.net.adapter.layers}.")
        number, _, rest = inside.partition(".")
        if inside == name:
            value = self.net.model.get_parameter(name)
        else:
            if number != self.block or rest not in self.left:
                self.block, self.left = number, self._cut(self.kept[int(number)])
            value = self.left.pop(rest)
        return value.detach().to(device, self.dtype)

    def _cut(self, index: int) -> dict[str, Tensor]:
        dense, store = self.net.blocks[index], self.net.store
        block = shallow(dense)
        for site, count in zip(self.net.space.sites, self.plan, strict=True):
            if site.block == index:
                device = self.net.adapter.linear(dense, site).weight.device
                for path, module in self.net.adapter.pruned(dense, site, store.get(site, count, device)).items():
                    block.set_submodule(path, module)
        return {name: block.get_parameter(name) for name, _ in block.named_parameters()}


def save(
    model: PreTrainedModel,
    directory: str | Path,
    tokenizer: Any = None,
    code: Code = "import",
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD_BYTES,
) -> None:
    """Write what `to_transformers` made: config, safetensors, generation config and tokenizer files.

    Args:
        model: whole or paged; it is not changed.
        directory: a new folder, or one without a model.
        tokenizer: written beside it; None: there is none.
        code: how a model with unequal layers loads: after `import prunekit`, or by its bundled code with
            `trust_remote_code=True`. Stock models load anywhere and carry no code.
        dtype: of the weights in the files; None: that of the model.
        max_shard_size: of the largest file of weights, as 5GB.

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
        classes = {**dict(zip(model.family.autos, define(model.family), strict=True)), **define_heads(model.family)}
        model.config.auto_map = {auto: f"{BUNDLED}.{each.__name__}" for auto, each in classes.items()}
    with without_bars():
        if pager_of(model) is None:
            written = model if dtype in (None, model.dtype) else stored_as(copy.deepcopy(model), dtype)
            written.save_pretrained(directory, max_shard_size=max_shard_size)
        else:
            model.save_pretrained(directory, state_dict={})  # all but the weights
            _write_paged(model, directory, dtype, max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _write_paged(model: PreTrainedModel, directory: Path, dtype: torch.dtype | None, max_shard_size: str) -> None:
    """The weights as `save_pretrained` writes them, under the names that it gives them, one at a time."""
    with shapes_of(model):
        state = model.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(state.items())}  # tied ones are written once
    metas = {
        name: torch.empty_like(state[name], device="meta", dtype=dtype or state[name].dtype)
        for name in state
        if first[id(state[name])] == name
    }
    named = revert_weight_conversion(model, metas)
    # matrices of experts are split, and have another name each
    ours = {new: name for name, meta in metas.items() for new in revert_weight_conversion(model, {name: meta})}

    @lru_cache(maxsize=2)  # both parameters with the experts of a block, whose parts follow one another in a file
    def split_of(name: str) -> dict[str, Tensor]:
        return revert_weight_conversion(model, {name: real(state[name])})

    def read(name: str) -> Tensor:
        return split_of(ours[name])[name].to(named[name].dtype)

    write(directory, named, read, shard_bytes=max_shard_size)
    if dtype is not None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        write_json(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def _kept(model: PreTrainedModel, adapter: ModelAdapter) -> list[int]:
    """The blocks that an export has; at least one."""
    blocks = list(enumerate(adapter.blocks(model)))
    if not isinstance(adapter, Transformer):
        return [index for index, _ in blocks]
    # a block without both parts, and no norm after the sum, hands on what it gets
    there = [i for i, block in blocks if len(adapter.dropped(block)) < 2 or not adapter.family.has_norms_first(block)]
    attends = [i for i, block in blocks if adapter.family.there(block, "attention")]
    if attends and not {*attends} & {*there}:  # caches count tokens in a block with attention, or what is left of it
        there = sorted([*there, attends[0]])
    return there or [0]


def _native_biases(family: Family, values: dict[str, Any]) -> set[Part]:
    """The parts whose linear map with cut columns has a bias in the stock class."""
    listed = values.get("layer_types") if family.mixer is not None else None
    places = [listed.index(kind) for kind in dict.fromkeys(listed)] if listed else [0]  # one of each kind
    one: dict[str, Any] = values | {"num_hidden_layers": len(places)}
    for key in family.by_layer:
        if one.get(key):
            one[key] = [one[key][place] for place in places]
    config = CONFIG_MAPPING[family.text or family.model_type](**one)
    base: Any = MODEL_MAPPING[type(config)]
    with torch.device("meta"):
        stock = base(config)
    blocks = list(stock.get_submodule(family.layers if family.text is None else family.layers.rpartition(".")[2]))
    maps: list[tuple[Part, nn.Module, str]] = [
        (part, block, family.columns[part]) for part in PARTS for block in blocks if family.there(block, part)
    ]
    return {part for part, block, path in maps if block.get_submodule(path).bias is not None}


def _stock_config(
    family: Family, values: dict[str, Any], sizes: Sequence[dict[str, Any]], head_dim: int | None
) -> PreTrainedConfig | None:
    """The config of a stock class that can hold layers of these sizes, if there is one."""
    first = sizes[0]
    ours = {"skip", "biased", "ranks", "values", "patch", *(() if family.mixer is None else family.mixer.fixed(values))}
    if ours & first.keys() or any(size != first for size in sizes):
        return None
    hidden = values["hidden_size"]
    if not family.free_head_dim and head_dim is not None and first[family.query_heads] * head_dim != hidden:
        return None
    values, model_type = values | first, family.text or family.model_type
    if model_type == "llama" and hidden % first[family.query_heads]:  # which Llama's validator forbids, not Mistral's
        if values.pop("attention_bias") or values.pop("mlp_bias"):
            return None
        values.pop("pretraining_tp", None)
        values["sliding_window"], model_type = None, "mistral"
    try:
        return CONFIG_MAPPING[model_type](**values)
    except StrictDataclassError:  # its validators demand of head counts what the model itself does not
        return None


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
    take_tables(small, model)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    small.config.dtype = model.dtype
    return small.train(model.training)
