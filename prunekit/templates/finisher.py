"""A finisher for prunekit: a recovery step after pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import prunekit as pk
from prunekit.calibration.twin import Twin


@dataclass(frozen=True)
class Template(pk.Finisher):
    """Scale every cut linear layer until its output has the power of the dense one's.

        W ← a W,   a = (Σ ‖y_dense‖² / Σ ‖y_pruned‖²)^(strength / 2)      sums over calibration tokens      (1)

    Source: write here the paper, and where the code differs from it.
    """

    strength: float = 1.0  # 0: nothing is changed; 1: all of the difference is made up for

    @torch.no_grad()
    def finish(self, piece: pk.Workpiece) -> dict[str, object]:
        """Change the weights of `piece.model` in place: your step goes here."""
        gains = dict[str, float]()
        with piece.progress.stage("template", sum(map(bool, piece.kept))) as stage:
            for here in Twin(piece, piece.tokens):  # sub-layer by sub-layer; what is changed reaches the next
                chunks = range(len(here))
                dense = sum(float(here.wanted(i, "dense").square().sum()) for i in chunks)
                small = sum(float(here.made(i).square().sum()) for i in chunks)
                gains[here.site.name] = (dense / small) ** (self.strength / 2) if small else 1.0  # (1)
                here.linear.weight *= gains[here.site.name]
                stage.advance(note=here.site.name)
        return {"gains": gains}  # goes into report.json
