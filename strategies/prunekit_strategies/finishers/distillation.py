"""The small model learns the dense model's predictions."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from prunekit import Finisher, Workpiece
from prunekit.models.paging import whole
from prunekit_strategies.finishers.training import LanguageLoss, TextTraining, gained, holding_zeros

Scope = Literal["model", "blocks", "cut"]


@dataclass(frozen=True)
class Distillation(TextTraining, Finisher):
    """Train the small model on the recovery tokens to predict what the dense model predicts.

        min over θ   τ² KL(softmax(z / τ) ‖ softmax(ẑ / τ)) + truth · CE(ẑ, next token)      (1)

    with logits z of the dense and ẑ of the small model, mean per token. AdamW with a cosine and gradients of norm 1
    at most; windows are held out, and θ ends where (1) on them was lowest, never above the start.

    Source: Hinton et al. 2015 (arXiv 1503.02531) for (1); Minitron (arXiv 2407.14679) for logits alone as the
    teacher of a pruned model. A short loop for recovery, not for training from scratch. With `correction`, a copy of
    the dense model first learns the next tokens of the same text, so many epochs, and teaches in its place: teacher
    correction (Sreenivas et al. 2024, arXiv 2408.11796), there on 100 billion tokens, for a text that the dense model
    was not trained on. It ends where its own held-out loss was lowest; the dense model itself stays as it was.

    Memory: gradients and two moments of θ in float32, and activations of `batch_tokens` tokens through both models;
    with `correction` as much for a copy of the dense model; logits live for one slice of positions at a time. Single
    weights that were removed stay zero. After an interruption it goes on behind the last whole epoch.
    """

    structures = frozenset({"groups", "weights", "n:m", "low-rank"})
    knows_width = True

    rate: float = 1e-4  # of AdamW, at its height; models of a few million parameters bear 3e-4
    epochs: int = 4
    scope: Scope = "model"  # what is trained: all, the blocks, or only the linear maps that were cut
    temperature: float = 1.0  # τ
    truth: float = 0.0  # weight of the next-token loss
    correction: int = 0  # epochs in which a copy of the dense model learns the text before it teaches
    correction_rate: float | None = None  # of AdamW for it; None: a tenth of `rate`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.temperature > 0 and self.truth >= 0):
            raise ValueError(f"temperature > 0 and truth ≥ 0 are needed, not {self.temperature} and {self.truth}")

        if self.correction < 0 or not (self.correction_rate is None or self.correction_rate > 0):
            raise ValueError(
                f"correction ≥ 0 and correction_rate > 0 (or null) are needed, not {self.correction} and "
                f"{self.correction_rate}"
            )

    def finish(self, piece: Workpiece) -> dict[str, Any]:
        ends, teacher, corrected = self.deadline(piece, "model"), piece.dense, {}
        if self.correction:
            begun = time.perf_counter()
            teacher, held = self._corrected(piece)
            corrected = {"teacher_held_out_loss": held}
            if piece.seconds is not None:
                piece = replace(piece, seconds=max(0.0, piece.seconds - (time.perf_counter() - begun)))
        loss = LanguageLoss(piece.model, teacher, self.truth, 1.0, self.temperature)
        theta = self._trained(piece)
        for parameter in theta:
            parameter.requires_grad_(True)
        with piece.progress.stage("distill", self.epochs) as stage, holding_zeros(piece):
            paced = self.paced(piece, loss, theta, "model")
            course = paced.learn(piece, loss, theta, "model", stage, ends)
        for parameter in theta:
            parameter.requires_grad_(False)
        return {**gained(piece, "distillation", paced, course), **corrected}

    def _corrected(self, piece: Workpiece) -> tuple[Any, list[float]]:
        """(a copy of the dense model that has learnt the text, its held-out loss before and after)."""
        teacher = whole(piece.dense)
        if next(teacher.parameters()).dtype != torch.float64:
            teacher = teacher.float()
        theta = list(teacher.requires_grad_(True).parameters())
        rate = self.rate / 10 if self.correction_rate is None else self.correction_rate
        own = replace(self, rate=rate, epochs=self.correction, steps=None, correction=0, loading="fixed")
        loss = LanguageLoss(teacher, None, 1.0, 0.0)
        with piece.progress.stage("correct the teacher", self.correction) as stage:
            course = own.learn(piece, loss, theta, "teacher", stage, math.inf)
        return teacher.requires_grad_(False), [course.losses[0], min(course.losses)]

    def _trained(self, piece: Workpiece) -> list[nn.Parameter]:
        if self.scope == "model":
            return list(piece.model.parameters())
        blocks = piece.adapter.blocks(piece.model)
        if self.scope == "blocks":
            return list(blocks.parameters())
        cut = [site for site, count in zip(piece.sites, piece.plan, strict=True) if count]
        maps = (blocks[site.block].get_submodule(piece.adapter.path(site)) for site in cut)  # of low rank they are two
        return [parameter for module in maps for parameter in module.parameters()]
