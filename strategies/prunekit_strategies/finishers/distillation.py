"""The small model learns the dense model's predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from prunekit import Finisher, Workpiece
from prunekit_strategies.finishers.training import LanguageLoss, Training, gained, holding_zeros

Scope = Literal["model", "blocks", "cut"]


@dataclass(frozen=True)
class Distillation(Training, Finisher):
    """Train the small model on the recovery tokens to predict what the dense model predicts.

        min over θ   τ² KL(softmax(z / τ) ‖ softmax(ẑ / τ)) + truth · CE(ẑ, next token)      (1)

    with logits z of the dense and ẑ of the small model, mean per token. AdamW with a cosine and gradients of norm 1
    at most; windows are held out, and θ ends where (1) on them was lowest, never above the start.

    Source: Hinton et al. 2015 (arXiv 1503.02531) for (1); Minitron (arXiv 2407.14679) for logits alone as the
    teacher of a pruned model. A short loop for recovery, not for training from scratch.

    Memory: gradients and two moments of θ in float32, and activations of `batch_tokens` tokens through both models;
    logits live for one slice of positions at a time. Single weights that were removed stay zero. After an interruption
    it goes on behind the last whole epoch.
    """

    structures = frozenset({"groups", "weights", "n:m", "low-rank"})
    knows_width = True

    rate: float = 1e-4  # of AdamW, at its height; models of a few million parameters bear 3e-4
    epochs: int = 4
    scope: Scope = "model"  # what is trained: all, the blocks, or only the linear maps that were cut
    temperature: float = 1.0  # τ
    truth: float = 0.0  # weight of the next-token loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature > 0 and self.truth >= 0):
            raise ValueError(f"temperature > 0 and truth ≥ 0 are needed, not {self.temperature} and {self.truth}")

    def finish(self, piece: Workpiece) -> dict[str, Any]:
        ends = self.deadline(piece, "model")
        loss = LanguageLoss(piece.model, piece.dense, self.truth, 1.0, self.temperature)
        theta = self._trained(piece)
        for parameter in theta:
            parameter.requires_grad_(True)
        with piece.progress.stage("distill", self.epochs) as stage, holding_zeros(piece):
            paced = self.paced(piece, loss, theta, "model")
            course = paced.learn(piece, loss, theta, "model", stage, ends)
        for parameter in theta:
            parameter.requires_grad_(False)
        return gained(piece, "distillation", paced, course)

    def _trained(self, piece: Workpiece) -> list[nn.Parameter]:
        if self.scope == "model":
            return list(piece.model.parameters())
        blocks = piece.adapter.blocks(piece.model)
        if self.scope == "blocks":
            return list(blocks.parameters())
        cut = [site for site, count in zip(piece.sites, piece.plan, strict=True) if count]
        maps = (blocks[site.block].get_submodule(piece.adapter.path(site)) for site in cut)  # of low rank they are two
        return [parameter for module in maps for parameter in module.parameters()]
