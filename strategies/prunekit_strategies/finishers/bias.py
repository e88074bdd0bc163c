"""Biases in the place of what was removed: the mean output that a linear map lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from prunekit import Finisher, Workpiece, check_choices
from prunekit.calibration.twin import Twin

Inputs = Literal["dense", "pruned"]


@dataclass(frozen=True)
class Bias(Finisher):
    """Give every cut linear map, as a bias, the mean output it has lost.

    With W (d_out, d_in) and b of the dense model, Ŵ (d_out, kept) of the small one, and means over tokens of what
    they receive, μ (d_in) and μ̂ (kept):

        b̂ = b + W μ - Ŵ μ̂      (1)

    Source: FLAP (An et al. 2023, arXiv 2312.11983): where the pruner left weights as they were, Ŵ = W_K, and means
    are those of the dense model, μ̂ = μ_K, (1) is its b + W (μ ∘ (1 - mask)). Then what is left of the error of
    removing column j alone is Var(x_j) ‖W_:j‖², its WIFV score.
    Ours: (1) holds for any Ŵ, so it goes behind refitting pruners too; `inputs="pruned"` takes μ̂ behind the layers
    that are pruned already, which makes the mean output of every sub-layer that of the dense model.

    Families without these biases get d_out parameters for each sub-layer that is left. The budget pays: the
    allocator has that much less to spend. The stock classes of such families cannot hold them alone, so the result
    is of prunekit's classes. A sub-layer that was dropped gets none. Costs one pass through both models; linear
    in the tokens and deterministic, so nothing is kept for a resumed run.
    """

    inputs: Inputs = "dense"  # whose means stand for what the small layer receives: as FLAP, or as it will really be

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def adds_biases(self) -> bool:
        return True

    @torch.no_grad()
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        added = 0
        with piece.progress.stage("bias", sum(map(bool, piece.kept))) as stage:
            for here in Twin(piece, piece.tokens):
                linear, dense = here.linear, here.dense_linear
                total = torch.zeros(dense.in_features, dtype=torch.float64, device=dense.weight.device)
                seen = torch.zeros(linear.in_features, dtype=torch.float64, device=dense.weight.device)
                for i in range(len(here)):
                    x = here.dense_inputs(i)
                    total += x.double().flatten(0, -2).sum(0)
                    x_hat = x[..., here.columns] if self.inputs == "dense" else here.inputs(i)
                    seen += x_hat.double().flatten(0, -2).sum(0)
                bias = (dense.weight.double() @ total - linear.weight.double() @ seen) / piece.tokens.n_tokens
                bias += 0 if dense.bias is None else dense.bias.double()  # (1)
                added += 0 if linear.bias is not None else bias.numel()
                linear.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
                stage.advance(note=here.site.name)
        return {"parameters_added": added}
