"""The exporter: refuse, write, verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

import prunekit as pk
from prunekit.export.fresh import Failed, ask_fresh, python_of
from prunekit.models.shards import SHARD_BYTES
from prunekit.space.prices import Workload
from prunekit.system.files import read_json, write_json
from prunekit_strategies.exporters.hf import HF
from prunekit_strategies.exporters.vllm import engine as runner

REFUSED: Mapping[str, str] = {}
BY_HIDDEN = ("qwen2",)  # whose own class in vLLM takes the width of a head from hidden size / heads
BACKEND = "TransformersForCausalLM"  # vLLM's name of the class that runs a model as transformers has it


@dataclass(frozen=True)
class VLLM(pk.Exporter):
    """The folder of `hf`, refused before any work where vLLM cannot serve it, and run by vLLM where that is installed.

    Layers of unequal sizes are served through vLLM's backend for models of transformers, which reads the sizes of each
    layer from the config. The classes are prunekit's, which vLLM finds by an entry point where prunekit is installed,
    or in the folder (code=bundled) where its user says --trust-remote-code. Removed attention has no weights, and one
    head's room in the cache. Equal layers take the class that vLLM has for the family.
    """

    structures: ClassVar[frozenset[str]] = HF.structures
    engine: ClassVar[str] = "vllm"
    engine_modules: ClassVar[tuple[str, ...]] = ("vllm",)
    install: ClassVar[str] = "vllm"
    engine_python: ClassVar[str] = "PRUNEKIT_VLLM_PYTHON"

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # of the weights; auto: that of the checkpoint
    max_shard_size: str = SHARD_BYTES  # of the largest file of weights, as 5GB

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
        if (why := REFUSED.get(family.model_type)) is not None:
            raise pk.WrongInput(f"format 'vllm' cannot write {family.prefix} models: {why}")

    def write(self, product: pk.Product, path: Path) -> None:
        self._hf.write(product, path)
        config = read_json(path / "config.json")
        heads, width = config.get("num_attention_heads"), config.get("head_dim")
        if config["model_type"] in BY_HIDDEN and width and heads * width != config["hidden_size"]:
            write_json(path / "config.json", config | {"architectures": [BACKEND]})

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
        return self._hf.tolerance(path, dtype)

    def timer(self, path: Path) -> Callable[[Workload], tuple[int, int]]:
        run = runner.Timer(path, python_of(self.engine_python), torch.get_num_threads())
        return lambda work: run(work.batch, work.prompt, work.new_tokens)

    def size(self, order: pk.Order) -> int:
        return self._hf.size(order)

    def files(self, folder: Path) -> list[Path]:
        return self._hf.files(folder)
