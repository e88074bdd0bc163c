"""Models whose layers differ in size, or lack attention or MLP, as ordinary transformers classes.

The stock model is built from the global sizes, then every layer is cut to its entry of the config's
`per_layer_config`, given the biases that its `biased` names, its linear maps that `ranks` names become two, its heads
have as many values as `values` says, and its MLP gets a linear map beside it, of the rank that `patch` says. Layers
stay what they were, so checkpointing, adapters and serving engines find the classes they know.
Exported models may carry a copy of this file: it needs torch and transformers and nothing of prunekit.
"""

from __future__ import annotations

import copy
import importlib
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Part = Literal["attention", "mixer", "mlp"]  # in order of execution; a block has attention or another mixer
Unit = Literal["query", "gated", "kv", "qkv", "width"]  # gated: a query head, and below it as many rows of its gate
Units = Unit | tuple[Unit, ...]

HEADS = {  # of models that were made for language: what else may stand on their base model
    "AutoModelForSequenceClassification": (AutoModelForSequenceClassification, "ForSequenceClassification"),
    "AutoModelForTokenClassification": (AutoModelForTokenClassification, "ForTokenClassification"),
}
SERVED = "vllm"  # attention implementation of an engine that keeps the cache itself, a part of it for every layer
BUNDLED = "modeling_prunekit"  # name of the copy of this file in an exported directory


@dataclass(frozen=True, eq=False)
class Experts:
    """What a family calls the experts of a block and their router; all parameters of both count experts first."""

    count: str  # in the config: how many there are
    width: str = "moe_intermediate_size"  # in the config: neurons of each
    path: str = "mlp.experts"  # the module with the matrices of all experts
    router: str = "mlp.gate"
    outputs: tuple[str, ...] = ("down_proj",)  # matrix and bias that the outputs of the experts are proportional to
    inputs: tuple[str, ...] = ("gate_up_proj",)  # matrix and bias before the neurons: all gates, then what they gate
    transposed: bool = False  # matrices are (experts, in, out) and not (experts, out, in); gates and gated take turns
    shared: str | None = None  # an MLP beside them, of gate_proj, up_proj and down_proj; None: there is none
    shared_width: str = "shared_expert_intermediate_size"  # in the config: neurons of it
    shared_gate: str = "mlp.shared_expert_gate"  # whose sigmoid, one number for a token, its output is multiplied by

    def there(self, block: nn.Module) -> bool:
        """Whether a block has experts; some have a plain MLP."""
        return has(block, self.path)

    @property
    def shared_rows(self) -> tuple[str, ...]:
        """The linear maps of the shared expert in front of its neurons."""
        return () if self.shared is None else (f"{self.shared}.gate_proj", f"{self.shared}.up_proj")

    @property
    def shared_columns(self) -> str:
        """The linear map of the shared expert whose columns are its neurons."""
        return f"{self.shared}.down_proj"

    def slices(self, name: str) -> int | None:
        """The dimension of a parameter of the experts whose slices are neurons, or two for each; None: it has none."""
        if name == self.outputs[0]:
            return 1 if self.transposed else 2
        if name in self.inputs:
            return 2 if self.transposed and name == self.inputs[0] else 1
        return None

    def neurons(self, block: nn.Module) -> int:
        """Of every expert of a block."""
        return block.get_submodule(self.path).get_parameter(self.outputs[0]).shape[self.slices(self.outputs[0]) or 0]

    def resize(self, module: nn.Module, neurons: int) -> None:
        """Leave room for so many neurons in every expert, in place, and say so under the names it may keep them."""
        for name, _ in list(module.named_parameters()):
            if (dim := self.slices(name)) is not None:
                length = neurons if name == self.outputs[0] else 2 * neurons
                _resize_parameter(module, name, length, dim)
        for name in ("intermediate_dim", "intermediate_size"):
            if hasattr(module, name):
                setattr(module, name, neurons)

    def cut(self, block: nn.Module, count: int, neurons: int, shared: int = 0) -> None:
        """Leave room for so many experts of so many neurons, and for so many of the shared one, in place; what is in
        them is lost where it was another number."""
        if self.shared is not None:
            for path in self.shared_rows:
                _resize(block, path, rows=shared)
            _resize(block, self.shared_columns, columns=shared)
        self.resize(block.get_submodule(self.path), neurons)
        for path in (self.path, self.router):
            module = block.get_submodule(path)
            if module.num_experts != count:
                for name, _ in list(module.named_parameters()):
                    _resize_parameter(module, name, count)
                module.num_experts = count  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class TokenMixer(ABC):
    """What stands in the place of attention in some blocks of a family. Its units do not see each other: with each goes
    a run of slices of every parameter, or of every section of it."""

    path: str  # of the module, in a block that has it
    front: tuple[str, ...]  # inside: linear maps in front
    columns: str  # inside: the linear map whose columns are cut
    keys: ClassVar[tuple[str, ...]]  # in the config: how many units a layer has, and what there is in proportion

    @abstractmethod
    def units(self, module: nn.Module) -> int:
        """How many there are."""

    @abstractmethod
    def sections(self, module: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """What goes with one unit in each section, from the top down, by the name of a linear map (its rows), of a
        convolution (its channels) or of a parameter (its first dimension)."""

    def sizes(self, module: nn.Module) -> dict[str, int]:
        """What an entry of `per_layer_config` says of a module."""
        return {self.keys[0]: self.units(module)}

    def fixed(self, config: Mapping[str, Any]) -> Mapping[str, int]:
        """The sizes that the stock class has, whatever else its config says, by the keys that it does not know."""
        return {}

    @abstractmethod
    def recount(self, module: nn.Module, units: int) -> None:
        """Tell a module how many units it has, under the names it may keep them."""

    def fault(self, layer_config: Any) -> str:
        """What is wrong with the sizes of a layer, in words; empty: nothing."""
        units = getattr(layer_config, self.keys[0], 1)
        return "" if isinstance(units, int) and units >= 1 else f"{self.keys[0]} is {units!r}, and must be 1 or more"

    def cut(self, block: nn.Module, layer_config: Any) -> None:
        """Leave room for as many units as a layer has, in place."""
        module = block.get_submodule(self.path)
        before, units = self.units(module), getattr(layer_config, self.keys[0], None)
        if units is None or units == before:
            return
        for name, each in self.sections(module).items():
            count, found = units * sum(each), getattr(module, name)
            if name in self.front:
                _resize(module, name, rows=count)
            elif isinstance(found, nn.Conv1d):
                module.set_submodule(name, depthwise(found, count, found.weight.device))
            else:
                _resize_parameter(module, name, count)
        last = module.get_submodule(self.columns)
        assert isinstance(last, nn.Linear)
        _resize(module, self.columns, columns=last.in_features // before * units)
        self.recount(module, units)


@dataclass(frozen=True, eq=False)
class ShortConvolution(TokenMixer):
    """C ∘ conv(B ∘ x), with B, C and x of one linear map: a unit is a channel."""

    keys = ("conv_channels",)

    def units(self, module: nn.Module) -> int:
        return int(module.get_submodule(self.columns).in_features)  # type: ignore[arg-type]

    def sections(self, module: nn.Module) -> Mapping[str, tuple[int, ...]]:
        return {"in_proj": (1, 1, 1), "conv": (1,)}

    def fixed(self, config: Mapping[str, Any]) -> Mapping[str, int]:
        return {self.keys[0]: config["hidden_size"]}

    def recount(self, module: nn.Module, units: int) -> None:
        """It keeps none: its weights say it."""


@dataclass(frozen=True, eq=False)
class DeltaNet(TokenMixer):
    """A gated delta net: a unit is a key head with its queries and with the value heads that read it."""

    keys = ("linear_num_key_heads", "linear_num_value_heads")

    def units(self, module: nn.Module) -> int:
        return int(module.num_k_heads)  # type: ignore[arg-type]

    def sections(self, module: nn.Module) -> Mapping[str, tuple[int, ...]]:
        net: Any = module
        values = net.num_v_heads // net.num_k_heads
        key, value = net.head_k_dim, values * net.head_v_dim
        return {
            "in_proj_qkvz": (2 * key + 2 * value,),
            "in_proj_ba": (2 * values,),
            "conv1d": (key, key, value),
            "dt_bias": (values,),
            "A_log": (values,),
        }

    def sizes(self, module: nn.Module) -> dict[str, int]:
        net: Any = module
        return dict(zip(self.keys, (net.num_k_heads, net.num_v_heads), strict=True))

    def recount(self, module: nn.Module, units: int) -> None:
        net: Any = module
        heads = units * (net.num_v_heads // net.num_k_heads)
        net.num_k_heads, net.num_v_heads = units, heads
        net.key_dim, net.value_dim = units * net.head_k_dim, heads * net.head_v_dim
        net.conv_dim = 2 * net.key_dim + net.value_dim

    def fault(self, layer_config: Any) -> str:
        keys, values = (getattr(layer_config, key) for key in self.keys)
        fits = keys >= 1 and values >= 1 and values % keys == 0
        return "" if fits else f"{values} value heads do not share {keys} key heads evenly"


@dataclass(frozen=True, eq=False)
class Family:
    """What a model family calls its parts. Paths lie inside a decoder block, names in the config."""

    model_type: str  # of the stock classes
    prefix: str  # of the names of the stock classes
    rows: Mapping[str, Units]  # linear maps in front, by what their rows count from top to bottom; qkv: side by side
    columns: Mapping[Part, str]  # linear maps whose columns are cut
    norms: Mapping[Part, tuple[str, ...]]  # of a part, before and behind it; a block may lack some
    norms_first: str | None = None  # attribute of a block: does no norm come behind a sum? None: none ever does
    text: str | None = None  # model type of the part of a config that is of the language model; None: it is all of it
    module: str | None = None  # where the stock classes are; None: where the model type says
    stock_base: str | None = None  # name of the stock base model class; None: prefix and Model
    layers: str = "layers"  # the decoder blocks inside the base model
    attention: str = "self_attn"
    mlp: str | None = "mlp"  # None: the block itself holds the linear maps
    query_heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"  # None: as many as query heads
    width: str = "intermediate_size"
    head_dim: str = "head_dim"  # attribute of the attention module
    free_head_dim: bool = True  # stock attention takes head_dim from the config, not from hidden size / heads
    asks_config: bool = False  # attention asks its config, when it runs, how many query heads it has
    by_layer: tuple[str, ...] = ("layer_types",)  # lists in the config with one entry per layer
    per_head: tuple[str, ...] = ()  # parameters of attention that have one value for every query head
    experts: Experts | None = None  # in the place of the MLP, or of that of some blocks
    mixer: TokenMixer | None = None  # in the place of attention, in some blocks
    plain: Mapping[str, Any] = field(default_factory=dict)  # in the config: values with which sizes are what they say
    narrow: bool = False  # all that touches the residual stream: RMS norms before parts and head, and linear maps

    def __post_init__(self) -> None:
        if alone := next((name for name in self.norms.values() if isinstance(name, str)), None):
            raise TypeError(f"norms of {self.prefix} are tuples of names, so ({alone!r},) and not {alone!r}")

    @property
    def head(self) -> str:
        """What the stock class with a head is called behind the prefix."""
        return "ForCausalLM" if self.text is None else "ForConditionalGeneration"

    @property
    def autos(self) -> tuple[str, str, str]:
        """What loads each of the classes that `define` gives."""
        return "AutoConfig", "AutoModel", "AutoModelForCausalLM" if self.text is None else "AutoModelForImageTextToText"

    def heads(self, layer_config: Any) -> tuple[int, int]:
        """(query heads, KV heads) of one layer."""
        query = getattr(layer_config, self.query_heads)
        return query, query if self.kv_heads is None else getattr(layer_config, self.kv_heads)

    def skipped(self, block: nn.Module, part: Part, index: int, head_dim: int) -> dict[str, nn.Module]:
        """What stands in for a dropped part of `block`, by path; the norm goes where it serves that part alone."""
        stubs: dict[str, nn.Module]
        if part == "attention":
            config = getattr(block.get_submodule(self.attention), "config", None)
            stubs = {self.attention: SkippedMixer(index, head_dim, config)}
        elif part == "mixer":
            assert self.mixer is not None
            stubs = {self.mixer.path: SkippedState()}
        elif self.mlp is not None:
            stubs = {self.mlp: SkippedMLP()}
        else:
            stubs = {path: nn.Identity() for path in self.producers("mlp")}
            stubs[self.columns["mlp"]] = SkippedMLP()
        if self.has_norms_first(block):
            own = {p: [n for n in names if getattr(block, n, None) is not None] for p, names in self.norms.items()}
            if all(own.values()):  # else one norm serves both parts
                stubs |= {name: nn.Identity() for name in own[part]}
        return stubs

    def there(self, block: nn.Module, part: Part) -> bool:
        """Whether a block has a part, in one piece or dropped; some have another mixer in the place of attention."""
        if part == "mlp":
            return "mlp" in self.columns and (self.experts is None or not self.experts.there(block))
        path = self.attention if part == "attention" else self.mixer and self.mixer.path
        return bool(path) and has(block, path)

    @property
    def separate(self) -> tuple[str, str, str] | None:
        """The linear maps of queries, keys and values, where each is one by itself; None: they are not."""
        query, key, value = paths = tuple(f"{self.attention}.{name}_proj" for name in ("q", "k", "v"))
        there = [self.rows.get(path) for path in paths]
        return (query, key, value) if there == ["query", "kv", "kv"] else None

    @property
    def patches(self) -> bool:
        """Whether there is an MLP, one module, that a linear map can stand beside."""
        return self.mlp is not None and "mlp" in self.columns and self.experts is None

    def has_norms_first(self, block: nn.Module) -> bool:
        """Whether no norm comes behind a sum, so that a block without parts passes its input through."""
        return self.norms_first is None or bool(getattr(block, self.norms_first))

    def producers(self, part: Part) -> tuple[str, ...]:
        """The linear maps in front of the one whose columns are cut."""
        if part == "mixer":
            return () if self.mixer is None else tuple(f"{self.mixer.path}.{name}" for name in self.mixer.front)
        inside = f"{self.attention}."
        return tuple(path for path in self.rows if path.startswith(inside) == (part == "attention"))

    def units(self, path: str) -> tuple[Unit, ...]:
        """What the rows of a linear map in front count, from top to bottom."""
        units = self.rows[path]
        return units if isinstance(units, tuple) else (units,)

    def recount(self, attention: nn.Module, query: int, kv: int) -> None:
        """Tell an attention module its head counts, under the names it may keep them."""
        counts = {"num_heads": query, "num_key_value_heads": kv, "num_kv_heads": kv}
        for name, count in (counts | {"num_key_value_groups": query // kv}).items():
            if hasattr(attention, name):
                setattr(attention, name, count)
        if self.asks_config:
            attention.config = LayerConfig(attention.config, {self.query_heads: query})  # type: ignore[assignment]

    def cut(self, block: nn.Module, layer_config: Any, index: int) -> None:
        """Give a freshly built stock block the sizes of its layer, in place."""
        head_dim = 0
        if self.there(block, "attention"):
            attention = block.get_submodule(self.attention)
            head_dim, (query, kv) = int(getattr(attention, self.head_dim)), self.heads(layer_config)
            sizes = {"query": query, "gated": 2 * query, "kv": kv, "qkv": query + 2 * kv}
            self._cut_rows(block, "attention", {unit: heads * head_dim for unit, heads in sizes.items()})
            _resize(block, self.columns["attention"], columns=query * head_dim)
            for name in self.per_head:
                _resize_parameter(attention, name, query)
        elif self.mixer is not None:
            self.mixer.cut(block, layer_config)
        if self.there(block, "mlp"):
            width = getattr(layer_config, self.width)
            self._cut_rows(block, "mlp", {"width": width})
            _resize(block, self.columns["mlp"], columns=width)
        if self.experts is not None and self.experts.there(block):
            names = (self.experts.count, self.experts.width)
            names += () if self.experts.shared is None else (self.experts.shared_width,)
            self.experts.cut(block, *(getattr(layer_config, name) for name in names))
        for part in getattr(layer_config, "biased", ()):
            _resize(block, self.columns[part], bias=True)
        if self.there(block, "attention"):
            self.recount(block.get_submodule(self.attention), *self.heads(layer_config))
        self._narrow(block, layer_config, head_dim)
        if (rank := getattr(layer_config, "patch", 0)) and "mlp" not in getattr(layer_config, "skip", ()):
            assert self.mlp is not None  # checked with the config
            first, last = block.get_submodule(self.producers("mlp")[0]), block.get_submodule(self.columns["mlp"])
            assert isinstance(first, nn.Linear | LowRank)
            assert isinstance(last, nn.Linear | LowRank)
            weight = next(first.parameters())
            beside = LowRank(
                first.in_features, last.out_features, rank, bias=False, device=weight.device, dtype=weight.dtype
            )
            block.set_submodule(self.mlp, patched(block.get_submodule(self.mlp), beside))
        for part in getattr(layer_config, "skip", ()):
            for path, stub in self.skipped(block, part, index, head_dim).items():
                block.set_submodule(path, stub)

    def _narrow(self, block: nn.Module, layer_config: Any, head_dim: int) -> None:
        """Make maps two where they are of low rank, and heads narrower where they have fewer values, in place."""
        for path, rank in getattr(layer_config, "ranks", {}).items():
            whole = block.get_submodule(path)
            assert isinstance(whole, nn.Linear)
            block.set_submodule(path, LowRank.of(whole, rank))
        if (kept := getattr(layer_config, "values", 0)) and "attention" not in getattr(layer_config, "skip", ()):
            assert self.separate is not None  # checked with the config
            if kept > head_dim:
                raise ValueError(f"values is {kept}, and every head has {head_dim} at most")
            query, kv = self.heads(layer_config)
            for path, heads, kind in (
                (self.separate[-1], kv, NarrowValues), (self.columns["attention"], query, NarrowHeads),
            ):  # fmt: skip
                rows, columns = (heads * kept, None) if kind is NarrowValues else (None, heads * kept)
                _resize(block, path, rows=rows, columns=columns)
                linear = block.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                block.set_submodule(path, kind(linear, heads, head_dim))

    def _cut_rows(self, block: nn.Module, part: Part, count: Mapping[str, int]) -> None:
        for path in self.producers(part):
            _resize(block, path, rows=sum(count[unit] for unit in self.units(path)))

    def check(self, layer_config: Any, index: int) -> None:
        """Refuse sizes no layer can have.

        Raises:
            ValueError: says which layer and why.
        """
        query, kv = self.heads(layer_config)
        if kv < 1 or query < 1 or query % kv:
            raise ValueError(f"layer {index}: {query} query heads do not share {kv} KV heads evenly")
        if (width := getattr(layer_config, self.width)) < 1:
            raise ValueError(f"layer {index}: {self.width} is {width}; an absent MLP is written as skip: [mlp]")
        if self.experts is not None:
            count, least = getattr(layer_config, self.experts.count), layer_config.num_experts_per_tok
            if count < least:
                raise ValueError(f"layer {index}: {count} experts, and a token selects {least}")
            if (neurons := getattr(layer_config, self.experts.width)) < 1:
                raise ValueError(f"layer {index}: {self.experts.width} is {neurons}; an expert has one neuron or more")
            if self.experts.shared is not None and (own := getattr(layer_config, self.experts.shared_width)) < 1:
                raise ValueError(
                    f"layer {index}: {self.experts.shared_width} is {own}; a shared expert has one neuron or more"
                )
        if self.mixer is not None and (fault := self.mixer.fault(layer_config)):
            raise ValueError(f"layer {index}: {fault}")
        parts = [part for part in get_args(Part) if part != "mixer" or self.mixer is not None]
        for name in ("skip", "biased"):
            if strange := set(getattr(layer_config, name, ())) - {*parts}:
                listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
                raise ValueError(f"layer {index}: {name} lists {listed}, not {', '.join(sorted(strange))}")
        self._check_maps(layer_config, index)

    def _check_maps(self, layer_config: Any, index: int) -> None:
        """Refuse ranks and widths no linear map can have, as `check`."""
        known = {*self.rows, *self.producers("mixer"), *self.columns.values()}
        ranks = getattr(layer_config, "ranks", {})
        if strange := sorted(path for path, rank in ranks.items() if path not in known or not rank >= 1):
            raise ValueError(f"layer {index}: ranks names linear maps, each with a rank of 1 or more, not {strange[0]}")
        values = getattr(layer_config, "values", 0)
        if not isinstance(values, int) or values < 0 or (values and self.separate is None):
            raise ValueError(
                f"layer {index}: values is how many every head has, of a family with linear maps of queries, keys and "
                f"values by themselves, not {values!r} of {self.prefix}"
            )
        patch = getattr(layer_config, "patch", 0)
        if not isinstance(patch, int) or patch < 0:
            raise ValueError(f"layer {index}: patch is the rank of a linear map beside the MLP, not {patch!r}")
        if patch and not self.patches:
            raise ValueError(
                f"layer {index}: patch is {patch}, and {self.prefix} has no MLP of its own to stand beside"
            )


def has(block: nn.Module, path: str) -> bool:
    """Whether there is a module at a path in a block."""
    module = block
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True


SEPARATE: Mapping[str, Unit] = {"self_attn.q_proj": "query", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"}
NORMS: Mapping[Part, tuple[str, ...]] = {"attention": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}

AROUND: Mapping[Part, tuple[str, ...]] = {
    "attention": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


def llama_like(model_type: str, prefix: str, **others: Any) -> Family:
    """A family with Llama's parts: separate q, k, v and o, grouped KV heads, a gated MLP, norms first.

    Args:
        model_type, prefix: as of `Family`.
        others: fields of `Family` that are not as Llama's.
    """
    parts: dict[str, Any] = {
        "rows": {**SEPARATE, "mlp.gate_proj": "width", "mlp.up_proj": "width"},
        "columns": {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"},
        "norms": NORMS,
    }
    return Family(model_type, prefix, **(parts | others))


def of_experts(model_type: str, prefix: str, experts: Experts, *, plain: bool = False, **others: Any) -> Family:
    """A family with Llama's attention and, in the place of the MLP, experts.

    Args:
        model_type, prefix, experts: as of `Family`.
        plain: whether some blocks may have Llama's MLP.
        others: fields of `Family` that are not as Llama's.
    """
    parts: dict[str, Any] = {"experts": experts}
    if not plain:
        parts |= {"rows": SEPARATE, "columns": {"attention": "self_attn.o_proj"}}
    return llama_like(model_type, prefix, **(parts | others))


FAMILIES: Mapping[str, Family] = {
    "llama": llama_like("llama", "Llama", narrow=True),
    "mistral": llama_like("mistral", "Mistral", narrow=True),
    "qwen2": llama_like("qwen2", "Qwen2", narrow=True),
    "qwen3": llama_like("qwen3", "Qwen3", narrow=True),
    "smollm3": llama_like("smollm3", "SmolLM3", by_layer=("layer_types", "no_rope_layers"), narrow=True),
    "granite": llama_like("granite", "Granite", narrow=True),
    "olmo2": llama_like(
        "olmo2", "Olmo2", norms={"attention": ("post_attention_layernorm",), "mlp": ("post_feedforward_layernorm",)}
    ),
    "gemma2": llama_like("gemma2", "Gemma2", norms=AROUND),
    "gemma3_text": llama_like("gemma3_text", "Gemma3", norms=AROUND, module="gemma3", stock_base="Gemma3TextModel"),
    "cohere": llama_like("cohere", "Cohere", norms={"attention": ("input_layernorm",), "mlp": ()}),
    "stablelm": llama_like("stablelm", "StableLm", free_head_dim=False),
    "starcoder2": llama_like(
        "starcoder2",
        "Starcoder2",
        rows={**SEPARATE, "mlp.c_fc": "width"},
        columns={"attention": "self_attn.o_proj", "mlp": "mlp.c_proj"},
    ),
    "phi3": llama_like(
        "phi3",
        "Phi3",
        rows={"self_attn.qkv_proj": ("query", "kv", "kv"), "mlp.gate_up_proj": ("width", "width")},
        asks_config=True,
        narrow=True,
    ),
    "falcon": Family(
        "falcon",
        "Falcon",
        rows={"self_attention.query_key_value": "qkv", "mlp.dense_h_to_4h": "width"},
        columns={"attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"},
        norms={"attention": ("ln_attn", "input_layernorm"), "mlp": ("ln_mlp", "post_attention_layernorm")},
        layers="h",
        attention="self_attention",
        kv_heads="num_kv_heads",
        width="ffn_hidden_size",
        free_head_dim=False,
    ),
    "mixtral": of_experts("mixtral", "Mixtral", Experts("num_local_experts", "intermediate_size")),
    "olmoe": of_experts("olmoe", "Olmoe", Experts("num_experts", "intermediate_size")),
    "qwen2_moe": of_experts("qwen2_moe", "Qwen2Moe", Experts("num_experts", shared="mlp.shared_expert"), plain=True),
    "qwen3_moe": of_experts("qwen3_moe", "Qwen3Moe", Experts("num_local_experts"), plain=True),
    "qwen3_next": of_experts(
        "qwen3_next",
        "Qwen3Next",
        Experts("num_experts", shared="mlp.shared_expert"),
        rows={**SEPARATE, "self_attn.q_proj": "gated", "mlp.gate_proj": "width", "mlp.up_proj": "width"},
        columns={"attention": "self_attn.o_proj", "mixer": "linear_attn.out_proj", "mlp": "mlp.down_proj"},
        norms={**NORMS, "mixer": NORMS["attention"]},
        mixer=DeltaNet("linear_attn", ("in_proj_qkvz", "in_proj_ba"), "out_proj"),
    ),
    "gpt_oss": of_experts(
        "gpt_oss",
        "GptOss",
        Experts(
            "num_local_experts",
            "intermediate_size",
            router="mlp.router",
            outputs=("down_proj", "down_proj_bias"),
            inputs=("gate_up_proj", "gate_up_proj_bias"),
            transposed=True,
        ),
        per_head=("sinks",),
    ),
    "qwen2_5_vl": llama_like(
        "qwen2_5_vl", "Qwen2_5_VL", text="qwen2_5_vl_text", layers="language_model.layers", free_head_dim=False
    ),
    "lfm2": llama_like(
        "lfm2",
        "Lfm2",
        rows={**SEPARATE, "feed_forward.w1": "width", "feed_forward.w3": "width"},
        columns={"attention": "self_attn.out_proj", "mixer": "conv.out_proj", "mlp": "feed_forward.w2"},
        norms={"attention": ("operator_norm",), "mixer": ("operator_norm",), "mlp": ("ffn_norm",)},
        mlp="feed_forward",
        mixer=ShortConvolution("conv", ("in_proj",), "out_proj"),
        plain={"block_auto_adjust_ff_dim": False, "full_attn_idxs": None},
    ),
    "opt": Family(
        "opt",
        "OPT",
        rows={**SEPARATE, "fc1": "width"},
        columns={"attention": "self_attn.out_proj", "mlp": "fc2"},
        norms={"attention": ("self_attn_layer_norm",), "mlp": ("final_layer_norm",)},
        norms_first="do_layer_norm_before",
        layers="decoder.layers",
        mlp=None,
        kv_heads=None,
        width="ffn_dim",
        free_head_dim=False,
    ),
    "gpt_neox": Family(
        "gpt_neox",
        "GPTNeoX",
        rows={"attention.query_key_value": "qkv", "mlp.dense_h_to_4h": "width"},
        columns={"attention": "attention.dense", "mlp": "mlp.dense_4h_to_h"},
        norms=NORMS,
        attention="attention",
        kv_heads=None,
        head_dim="head_size",
        free_head_dim=False,
    ),
}


class SkippedMixer(nn.Module):  # transformers searches sources for "Attention(nn.Module)" classes: not this one
    """Attention that adds nothing, and keeps the cache in step: its length is read from the first layer.

    An engine that keeps the cache itself looks, in the source of every layer's attention, for the call by which it is
    asked; there one head of zeros is attended to.
    """

    def __init__(self, index: int, head_dim: int, config: Any = None) -> None:
        super().__init__()
        self.layer_idx, self.head_dim, self.config, self.scaling = index, head_dim, config, 1.0

    def forward(self, hidden_states: torch.Tensor, *_: Any, **rest: Any) -> tuple[torch.Tensor, None]:
        batch, length = hidden_states.shape[:2]
        cache = rest.get("past_key_values", rest.get("layer_past"))
        if cache is not None:
            empty = hidden_states.new_zeros(batch, 1, length, 1)  # of length alone
            cache.update(empty, empty, self.layer_idx)
        if getattr(self.config, "_attn_implementation", None) == SERVED:
            attend = ALL_ATTENTION_FUNCTIONS[SERVED]
            head = hidden_states.new_zeros(batch, 1, length, self.head_dim)
            attend(self, head, head, head, None, scaling=self.scaling)
        return torch.zeros_like(hidden_states), None


class SkippedState(nn.Module):
    """A mixer that adds nothing and has no state: caches count tokens in the blocks with attention."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class SkippedMLP(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class LowRank(nn.Sequential):
    """A linear map of low rank: `v` to as many values as the rank, and `u` from them, which has the bias."""

    v: nn.Linear
    u: nn.Linear

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, **place: Any) -> None:
        super().__init__()
        self.v = nn.Linear(in_features, rank, bias=False, **place)
        self.u = nn.Linear(rank, out_features, bias=bias, **place)

    @classmethod
    def of(cls, linear: nn.Linear, rank: int) -> LowRank:
        """In the place of a linear map, with values of its own."""
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        return cls(linear.in_features, linear.out_features, rank, linear.bias is not None, **place)

    @property
    def in_features(self) -> int:
        return self.v.in_features

    @property
    def out_features(self) -> int:
        return self.u.out_features

    @property
    def rank(self) -> int:
        return self.v.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        return self.u.bias


class NarrowValues(nn.Module):
    """Values of which every head has the first few alone: `narrow`, a linear map to these.

    Zeros stand in the place of the others, so that attention, its kernels and caches find heads of one width.
    """

    def __init__(self, narrow: nn.Linear, heads: int, width: int) -> None:
        """`heads`: KV heads; `width`: of a query or a key."""
        super().__init__()
        self.narrow, self.heads, self.width = narrow, heads, width

    @property
    def in_features(self) -> int:
        return self.narrow.in_features

    @property
    def out_features(self) -> int:
        return self.heads * self.width

    @property
    def bias(self) -> nn.Parameter | None:
        return self.narrow.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        each = self.narrow(hidden_states).unflatten(-1, (self.heads, -1))
        return nn.functional.pad(each, (0, self.width - each.shape[-1])).flatten(-2)


class NarrowHeads(nn.Module):
    """The linear map behind attention whose values are `NarrowValues`: `narrow` reads the first few of every head."""

    def __init__(self, narrow: nn.Linear, heads: int, width: int) -> None:
        """`heads`: query heads; `width`: of each."""
        super().__init__()
        self.narrow, self.heads, self.width = narrow, heads, width

    @property
    def kept(self) -> int:
        """Values of a head."""
        return self.narrow.in_features // self.heads

    @property
    def in_features(self) -> int:
        return self.heads * self.width

    @property
    def out_features(self) -> int:
        return self.narrow.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        return self.narrow.bias

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.narrow(values.unflatten(-1, (self.heads, self.width))[..., : self.kept].flatten(-2))


class Patched(nn.Module):
    """Mixed in before an MLP class: `patch`, a linear map of low rank, from the input of the MLP to its output."""

    patch: LowRank

    def forward(self, hidden_states: torch.Tensor, *args: Any, **rest: Any) -> torch.Tensor:
        return super().forward(hidden_states, *args, **rest) + self.patch(hidden_states)


@cache
def _patched_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Patched{kind.__name__}", (Patched, kind), {"__module__": __name__})


def patched(mlp: nn.Module, beside: LowRank) -> Patched:
    """An MLP with a linear map beside it, in the place of another if there is one.

    Args:
        mlp: stays as it is; whatever is in it is shared.
        beside: from the MLP's input to its output.
    """
    twin = copy.copy(mlp)
    twin._modules = dict(mlp._modules) | {"patch": beside}
    twin.__class__ = type(mlp) if isinstance(mlp, Patched) else _patched_class(type(mlp))
    return cast(Patched, twin)


class LayerConfig:
    """A config as one module reads it: some values of its own, all others as they are just then."""

    def __init__(self, config: Any, own: dict[str, Any]) -> None:
        self.whole, self.own = getattr(config, "whole", config), own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("whole", "own"):  # asked while it is copied
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.whole, name)


class UnequalLayers(PreTrainedModel):
    """Mixed in before a stock model class: its layers take their own sizes.

    `from_pretrained` builds on the meta device, so that the stock model in between costs no memory.
    """

    family: ClassVar[Family]

    def __init__(self, config: Any) -> None:
        sizes = config.get_text_config()
        with reading_globals(sizes):
            super().__init__(config)
        if self.base_model is not self and isinstance(self.base_model, UnequalLayers):
            return  # a head on a base model that the Auto class has made: one of ours
        inside = self.base_model.get_submodule(self.family.layers.rpartition(".")[0])  # the language model
        blocks = list(self.base_model.get_submodule(self.family.layers).children())
        attending = (block for block in blocks if self.family.there(block, "attention"))
        attention = next((block.get_submodule(self.family.attention) for block in attending), None)
        own = {} if attention is None else {"head_dim": int(getattr(attention, self.family.head_dim))}
        for index, block in enumerate(blocks):
            self.family.cut(block, sizes.per_layer_config[index], index)
        for module in inside.modules():
            if hasattr(module, "rope_type"):  # also when it runs, it asks for head counts that it does not use
                module.config = LayerConfig(sizes.per_layer_config[0], own)  # type: ignore[assignment]
        self.init_weights()  # the linear maps that were replaced

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As ever; a model that is loaded with remote code takes the code along."""
        if getattr(self.config, "auto_map", None):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(__file__, Path(save_directory, f"{BUNDLED}.py"))
        super().save_pretrained(save_directory, *args, **kwargs)


@cache
def define(family: Family) -> tuple[type, type, type]:
    """The config class, the base model class and the class with a head of a family with unequal layers."""
    stock, body = _stock(family), {"__module__": __name__, "family": family}
    base, causal = (getattr(stock, name) for name in (_base_name(family), f"{family.prefix}{family.head}"))
    stock_config: Any = base.config_class

    @strict  # else the stock validators run, not these
    class Config(stock_config):
        model_type = f"prunekit_{family.model_type}"

        def validate_architecture(self) -> None:
            for index, layer_config in enumerate(self.get_text_config().per_layer_config):
                family.check(layer_config, index)

        def validate_rope(self) -> None:  # LongRoPE's asks for head counts, too
            with reading_globals(self):
                stock_config.validate_rope(self)

    Config.__name__ = Config.__qualname__ = f"Prunekit{family.prefix}Config"
    if hasattr(stock_config, "logits_scaling"):  # which vLLM knows by another name, the other way round
        Config.logit_scale = property(lambda config: 1 / config.logits_scaling)  # type: ignore[attr-defined]
    body["config_class"] = Config
    return (
        Config,
        type(f"Prunekit{base.__name__}", (UnequalLayers, base), dict(body)),
        type(f"Prunekit{causal.__name__}", (UnequalLayers, causal), dict(body)),
    )


@cache
def define_heads(family: Family) -> Mapping[str, type]:
    """The classes of a family with unequal layers that classify texts or tokens, by the Auto class that loads them."""
    stock, (config, base, _) = _stock(family), define(family)
    AutoModel.register(config, base, exist_ok=True)  # some stock heads ask it for the base model that they stand on
    found = dict[str, type]()
    for auto, (_, suffix) in HEADS.items():
        name = f"{_base_name(family).removesuffix('Model')}{suffix}"
        if (head := getattr(stock, name, None)) is not None:
            body = {"__module__": __name__, "config_class": config, "family": family}
            found[auto] = type(f"Prunekit{name}", (UnequalLayers, head), body)
    return found


def _stock(family: Family) -> Any:
    module = family.module or family.model_type
    return importlib.import_module(f"transformers.models.{module}.modeling_{module}")


def _base_name(family: Family) -> str:
    return family.stock_base or f"{family.prefix}Model"


def register(families: Iterable[Family] = tuple(FAMILIES.values())) -> None:
    """Let the Auto classes of transformers load `prunekit_*` models. May be called again."""
    for family in families:
        config, base, causal = define(family)
        AutoConfig.register(f"prunekit_{family.model_type}", config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        auto: Any = AutoModelForCausalLM if family.text is None else AutoModelForImageTextToText
        auto.register(config, causal, exist_ok=True)
        for auto, head in define_heads(family).items():
            HEADS[auto][0].register(config, head, exist_ok=True)


@contextmanager
def reading_globals(config: Any) -> Iterator[None]:
    """Stock constructors may read the global value of a size that varies by layer, without a warning each."""
    warner = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    disabled, warner.disabled = warner.disabled, True
    within = config.__dict__.get("allow_global_per_layer_attribute_access")  # a head is made around a base model
    config.allow_global_per_layer_attribute_access = True
    try:
        yield
    finally:
        warner.disabled = disabled
        if not within:
            config.__dict__.pop("allow_global_per_layer_attribute_access", None)  # even False would be saved


def depthwise(conv: nn.Conv1d, channels: int, device: torch.device) -> nn.Conv1d:
    """A convolution of every channel by itself, as another is, with values of its own."""
    place: dict[str, Any] = {"padding": conv.padding, "device": device, "dtype": conv.weight.dtype}
    (size,) = conv.kernel_size
    return nn.Conv1d(channels, channels, size, groups=channels, bias=conv.bias is not None, **place)


def _resize_parameter(module: nn.Module, name: str, count: int, dim: int = 0) -> None:
    """Leave room for so many slices of a parameter, in place; what is in it is lost where it was another number."""
    old = module.get_parameter(name)
    if old.shape[dim] != count:
        setattr(module, name, nn.Parameter(old.new_empty(*old.shape[:dim], count, *old.shape[dim + 1 :])))
        module.__dict__.pop("_is_hf_initialized", None)  # else what is new would stay as memory was


def _resize(
    block: nn.Module, path: str, *, rows: int | None = None, columns: int | None = None, bias: bool = False
) -> None:
    old = block.get_submodule(path)
    assert isinstance(old, nn.Linear)
    here = old.in_features, old.out_features, old.bias is not None
    there = columns or here[0], rows or here[1], bias or here[2]
    if there != here:
        block.set_submodule(path, nn.Linear(*there, device=old.weight.device, dtype=old.weight.dtype))


def __getattr__(name: str) -> type:
    """PrunekitLlamaConfig, PrunekitLlamaModel, PrunekitLlamaForCausalLM, ...: defined when asked for."""
    families = [each for each in FAMILIES.values() if name.startswith(f"Prunekit{each.prefix}")]
    found = {each.__name__: each for family in families for each in (*define(family), *define_heads(family).values())}
    if name not in found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found[name]


if __name__ == "prunekit.models.classes":  # a copy in a model folder is registered by who loads it
    register()
