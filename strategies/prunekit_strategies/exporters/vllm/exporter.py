"""The exporter: refuse, write, verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

import prunekit as pk
from prunekit.export.fresh import Failed, ask_fresh, python_of
from prunekit.models.classes import Family
from prunekit.models.shards import SHARD_BYTES, Shards
from prunekit.space.prices import Workload
from prunekit.space.sites import Kind
from prunekit.system.files import read_json, write_json
from prunekit_strategies.exporters.hf import HF, ROUNDED
from prunekit_strategies.exporters.vllm import engine as runner

REFUSED: Mapping[str, str] = {  # of unequal layers, by model type
    "falcon": "its attention in transformers cannot be exchanged for that of an engine",
    "lfm2": "vLLM's way through transformers takes blocks with attention, and some blocks have another mixer",
    "qwen3_next": "vLLM's way through transformers takes blocks with attention, and some blocks have another mixer",
}
EXPERTS = 2e-3  # nats: by the kernel that adds up experts; 0.0009 was seen in float32
BY_HIDDEN: Mapping[str, str] = {  # where vLLM's own class takes the width of a head from hidden size / heads, and which
    "qwen2": "TransformersForCausalLM",  # of its classes then runs the model as transformers has it
    "qwen2_moe": "TransformersMoEForCausalLM",
}
WHOLE: Mapping[str, tuple[frozenset[Kind], str]] = {  # what has to stay whole where no other way leads through vLLM
    "lfm2": (
        frozenset({"attention"}),
        "with fewer heads: vLLM's own class takes the width of a head from hidden size / heads, and its way through "
        "transformers takes no block with another mixer; prune with spare.kinds=[attention,mixer], or take format 'hf'",
    ),
    "falcon": (
        frozenset({"attention", "mlp"}),
        "with fewer heads or neurons: vLLM's own class takes the width of a head from hidden size / heads and an MLP "
        "of 4 x hidden size, and there is no way through transformers; remove single weights, or take format 'hf'",
    ),
}


@dataclass(frozen=True)
class VLLM(pk.Exporter):
    """The folder of `hf`, refused before any work where vLLM cannot serve it, and run by vLLM where that is installed.

    Layers of unequal sizes are served through vLLM's backend for models of transformers, which reads the sizes of each
    layer from the config. The classes are prunekit's: vLLM finds them by an entry point where prunekit is installed, or
    in the folder (code=bundled) where its user says --trust-remote-code. Removed attention has no weights, and the room
    of one head in the cache. Equal layers take the class that vLLM has for the family.
    """

    structures: ClassVar[frozenset[str]] = HF.structures - {"values"}
    engine: ClassVar[str] = "vllm"
    engine_modules: ClassVar[tuple[str, ...]] = ("vllm",)
    install: ClassVar[str] = "vllm"
    engine_python: ClassVar[str] = "PRUNEKIT_VLLM_PYTHON"

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of the weights; auto: that of the checkpoint
    max_shard_size: str = SHARD_BYTES  # of the largest file of weights, as 5GB
    equal: bool = False  # a promise that all layers will keep the same sizes, as with allocator uniform

    def __post_init__(self) -> None:
        pk.check_choices(self)
        _ = self._hf

    @property
    def place(self) -> str:
        return ""

    @property
    def _hf(self) -> HF:
        return HF(dtype=self.dtype, max_shard_size=self.max_shard_size)

    def check(self, order: pk.Order) -> None:
        self._hf.check(order)
        family = getattr(order.adapter, "family", None)
        if family is None:
            raise pk.WrongInput(f"format 'vllm' writes models with attention, not {type(order.adapter).__name__}")
        if order.adapter.images:
            raise pk.WrongInput(
                "format 'vllm' writes language models, and this one takes images, too, which was not tried; take "
                "format 'hf'"
            )
        unequal = order.units in ("groups", "low-rank") and not (order.settled and not _is_ours(order.config))
        if unequal and not self.equal:
            _check_family(family)
        _check_whole(family, order)
        if order.settled and _is_ours(order.config):
            _check_experts(family, order.config)

    def write(self, product: pk.Product, path: Path) -> None:
        if _is_ours(product.model.config):
            _check_family(product.model.family)  # type: ignore[arg-type]
            _check_experts(product.model.family, product.model.config)  # type: ignore[arg-type]
        self._hf.write(product, path)
        config = read_json(path / "config.json")
        heads, width = config.get("num_attention_heads"), config.get("head_dim")
        if config["model_type"] in BY_HIDDEN and width and heads * width != config["hidden_size"]:
            write_json(path / "config.json", config | {"architectures": [BY_HIDDEN[config["model_type"]]]})

    def verify(self, path: Path, probe: pk.Probe) -> None:
        self._hf.verify(path, probe)

    def answers(self, path: Path, inquiry: pk.Inquiry) -> pk.Response:
        asked = {"ids": inquiry.ids, "tokens": inquiry.tokens, "prompt": inquiry.prompt}
        how = [path.resolve(), inquiry.new_tokens]
        try:
            told, found = ask_fresh(runner.__file__, asked, how, python=python_of(self.engine_python))
        except Failed as error:
            raise pk.NotVerified(f"vLLM does not run {path}: {runner.cause_of(str(error))}") from error
        return pk.Response(**found, parameters=told["parameters"], tensors=told["tensors"])  # type: ignore[arg-type]

    def tolerance(self, path: Path, dtype: torch.dtype | None = None) -> float:
        rounded = runner.model_type_of(path) in runner.IN_BFLOAT16  # where vLLM runs on a CPU, which is not known here
        allowed = ROUNDED["bfloat16"] if rounded else EXPERTS if _has_experts(path) else 0.0
        return max(self._hf.tolerance(path, dtype), allowed)

    def timer(self, path: Path) -> Callable[[Workload], tuple[int, int]]:
        run = runner.Timer(path, python_of(self.engine_python), torch.get_num_threads())

        def timed(work: Workload) -> tuple[int, int]:
            try:
                return run(work.batch, work.prompt, work.new_tokens)
            except RuntimeError as error:
                raise pk.NotVerified(f"{error}; `prunekit verify {path} --engine vllm` says why") from error

        return timed

    def size(self, order: pk.Order) -> int:
        return self._hf.size(order)

    def files(self, folder: Path) -> list[Path]:
        return self._hf.files(folder)


def _is_ours(config: Any) -> bool:
    """Whether a model is of prunekit's classes, because its layers differ."""
    return str(getattr(config, "model_type", "")).startswith("prunekit_")


def _has_experts(path: Path) -> bool:
    try:
        return any("experts" in name for name in Shards.of(str(path)).tensors)
    except pk.WrongInput:  # what is not there does not load
        return False


def _check_family(family: Family) -> None:
    if (why := REFUSED.get(family.model_type)) is not None:
        raise pk.WrongInput(f"format 'vllm' cannot write {family.prefix} models of unequal layers: {why}")


def _check_whole(family: Family, order: pk.Order) -> None:
    """Refuse fewer heads or neurons, before they go or after, where vLLM takes their number from the hidden size."""
    if family.model_type not in WHOLE:
        return
    kinds, why = WHOLE[family.model_type]
    fewer = order.units == "groups" and not order.settled and not kinds <= order.spared
    if (config := order.config) is not None:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = width * config.num_attention_heads != config.hidden_size
        neurons = "mlp" in kinds and getattr(config, family.width) != 4 * config.hidden_size
        fewer |= neurons or (order.settled and heads)
    if fewer:
        raise pk.WrongInput(f"format 'vllm' cannot write {family.prefix} models {why}")


def _check_experts(family: Family, config: Any) -> None:
    """Refuse experts whose neurons vary by layer: vLLM asks the config for one number for all."""
    if family.experts is None:
        return
    widths = {getattr(layer, family.experts.width) for layer in config.per_layer_config}
    if len(widths) > 1:
        raise pk.WrongInput(
            f"format 'vllm' cannot write {family.prefix} models whose experts have {min(widths):,} to {max(widths):,} "
            f"neurons by layer: vLLM reads one number for all layers; prune with allocator uniform, or take format 'hf'"
        )
