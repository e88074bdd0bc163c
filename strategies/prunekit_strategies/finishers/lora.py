"""Low-rank corrections of all linear maps in the blocks, trained on text and merged into the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from prunekit import Finisher, Workpiece
from prunekit_strategies.finishers.training import LanguageLoss, TextTraining, gained


@dataclass(frozen=True)
class LoRA(TextTraining, Finisher):
    """Train Ŵ + (α / r) B A on the recovery tokens, A (r, d_in), B (d_out, r) for every linear map, then merge.

        min over A, B   CE(ẑ, next token) + teacher · KL(softmax(z) ‖ softmax(ẑ))      (1)

    with logits ẑ of the small and z of the dense model, mean per token. B starts at zero, A at random from the seed.
    AdamW with a cosine; windows are held out, and A, B end where (1) on them was lowest, never above the start.

    Source: LoRA (Hu et al. 2021, arXiv 2106.09685) by `peft`; as recovery of pruned models LLM-Pruner (arXiv
    2305.11627), SlimGPT and Týr-the-Pruner (arXiv 2503.09657, rank 16). Those train on instructions; this trains on
    the recovery tokens. Merged weights have the shape they had: nothing of LoRA is left in the result. Of a map of low
    rank both factors are trained at once, each with A and B of its own, where SVD-LLM (arXiv 2403.07378) trains one
    after the other.

    Memory: the small model, gradients and two moments of A and B, and activations of `batch_tokens` tokens; with a
    teacher, the dense model's too. After an interruption it goes on behind the last whole epoch.
    """

    structures = frozenset({"groups", "low-rank"})
    knows_width = True

    rank: int = 16
    alpha: float = 32.0
    rate: float = 1e-3
    epochs: int = 3
    teacher: float = 0.0  # weight of the divergence from the dense model

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not (self.alpha > 0 and self.teacher >= 0):
            raise ValueError(
                f"rank ≥ 1, alpha > 0 and teacher ≥ 0 are needed, not {self.rank}, {self.alpha} and {self.teacher}"
            )

    def finish(self, piece: Workpiece) -> dict[str, Any]:
        ends = self.deadline(piece, "lora")
        loss = LanguageLoss(piece.model, piece.dense, 1.0, self.teacher)
        with self._adapted(piece) as theta, piece.progress.stage("lora", self.epochs) as stage:
            paced = self.paced(piece, loss, theta, "lora")
            course = paced.learn(piece, loss, theta, "lora", stage, ends)
        return gained(piece, "lora", paced, course)

    @contextmanager
    def _adapted(self, piece: Workpiece) -> Iterator[list[nn.Parameter]]:
        """Within: the model with A and B, which are what is given; afterwards they are in its weights."""
        model, blocks = piece.model, piece.adapter.blocks(piece.model)
        plain = {path: module for path, module in blocks.named_modules() if isinstance(module, nn.Linear)}
        place = next(path for path, module in model.named_modules() if module is blocks)
        options = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=[f"{place}.{path}" for path in plain])  # type: ignore[arg-type]
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # A is drawn from the global state
            torch.manual_seed(piece.seed)
            inject_adapter_in_model(options, model)
        layers: dict[str, Any] = {n: module for n, module in blocks.named_modules() if isinstance(module, LoraLayer)}
        for path, layer in layers.items():
            layer.to(plain[path].weight.dtype)
        try:
            yield [p for p in blocks.parameters() if p.requires_grad]
        finally:
            for path, layer in layers.items():
                layer.merge()
                blocks.set_submodule(path, plain[path])
            model.requires_grad_(False)
            vars(model).pop("peft_config", None)
