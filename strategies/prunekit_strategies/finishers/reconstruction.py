"""Every sub-layer learns to do what the dense one did, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit import Finisher, Workpiece
from prunekit.calibration.twin import Aim, SubLayer, Twin
from prunekit_strategies.finishers.training import Training, held_out

TRIES = 3  # epochs of a sub-layer that may look for a rate: down to a 27th


@dataclass(frozen=True)
class Reconstruction(Training, Finisher):
    """Train all linear maps of attention, then of the MLP, block by block, to the dense sub-layer's output.

    With θ the weights and biases of q, k, v, o or of gate, up, down, h̃ the hidden states behind what is finished,
    and y (tokens, d) what should come out (`aim`, as in `least-squares`):

        min over θ   Σ ‖f_θ(h̃) - y‖² / Σ ‖y‖²        (1)

    AdamW with a cosine and gradients of norm 1 at most. Windows are held out: θ ends where its error on them was
    lowest, which may be where it began, so no sub-layer is ever worse there. The rate is what they bear: as long as no
    epoch has lowered that error, the first is made again at a third of it, at most TRIES times.

    Source: "A Free Lunch in LLM Compression" (arXiv 2510.14444): regions with one non-linearity in them, attention
    and MLP apart, recover better than single matrices or whole blocks, and differences between pruning criteria
    shrink. The regions and (1) are the paper's; rates, epochs and the aim at the residual stream are ours.

    Memory: besides the streams of a `Twin`, y, and of one sub-layer the gradients and two moments of AdamW, with
    activations of `batch_tokens` tokens. A sub-layer that is finished is not trained again after an interruption.
    """

    aim: Aim = "stream"
    rate: float = 2e-3  # of AdamW, at its height, or as many thirds of it as the held-out windows ask for
    epochs: int = 4

    def finish(self, piece: Workpiece) -> dict[str, Any]:
        errors = dict[str, Any]()
        twins = [Twin(piece, some, tokens=self.batch_tokens) for some in held_out(piece.tokens, self.held_out)]
        with piece.progress.stage("reconstruct", self.epochs * sum(map(bool, piece.kept))) as stage:
            for here, judge in zip(*twins, strict=True):
                (wanted, power), (asked, measure) = (_targets(some, self.aim) for some in (here, judge))
                theta = [p for linear in here.maps for p in linear.parameters()]
                for parameter in theta:
                    parameter.requires_grad_(True)
                history = self.fit(
                    theta,
                    lambda i, here=here, wanted=wanted, power=power: _error(here, wanted, i) / power * len(here),
                    len(here),
                    lambda judge=judge, asked=asked, measure=measure: _held(judge, asked) / measure,
                    seed=piece.seed,
                    checkpoints=piece.checkpoints,
                    name=here.site.name,
                    stage=stage,
                    tries=TRIES,
                ).losses
                for parameter in theta:
                    parameter.requires_grad_(False)
                errors[here.site.name] = [history[0], min(history)]
        better = sum(after < before for before, after in errors.values())
        piece.progress.say(_told(errors, better))
        return {"held_out_errors": errors, "better": better}


def _told(errors: Mapping[str, Sequence[float]], better: int) -> str:
    """What was gained, in a sentence for the user."""
    if not better:
        return (
            f"reconstruction: none of {len(errors)} sub-layers came closer on held-out windows, so nothing was changed"
        )
    first, last = (sum(column) / len(errors) for column in zip(*errors.values(), strict=True))
    return (
        f"reconstruction: {better} of {len(errors)} sub-layers came closer to the dense ones; the mean held-out error "
        f"fell from {first:.4g} to {last:.4g}"
    )


def _targets(here: SubLayer, aim: Aim) -> tuple[list[Tensor], float]:
    """y by chunk, and Σ ‖y‖²; 1 where nothing is wanted."""
    wanted = [here.wanted(i, aim) for i in range(len(here))]
    return wanted, sum(float(y.square().sum(dtype=torch.float64)) for y in wanted) or 1.0


def _error(here: SubLayer, wanted: list[Tensor], i: int) -> Tensor:
    return (here.made(i) - wanted[i]).square().sum()


@torch.no_grad()
def _held(here: SubLayer, wanted: list[Tensor]) -> float:
    return sum(float(_error(here, wanted, i)) for i in range(len(here)))
