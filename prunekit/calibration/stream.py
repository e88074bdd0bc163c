"""Statistics of the residual stream: what every norm of a model receives and makes of the calibration tokens."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.moments import add_product, precise
from prunekit.data.tokens import TokenBatch
from prunekit.models.adapters.transformer import Transformer
from prunekit.models.blocks import chunks
from prunekit.models.width import norms
from prunekit.plugins.width import ResidualStream
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import Progress

NAME = "stream"


@torch.no_grad()
def collect_stream(
    model: Any, adapter: Transformer, tokens: TokenBatch, directory: Path, progress: Progress, *, gram: bool
) -> ResidualStream:
    """Go through the model once, unless that was done before.

    Args:
        model: the dense one, whole.
        adapter: of its family.
        tokens: of calibration, in whole windows.
        directory: where the statistics are kept.
        progress: advanced at every few windows.
        gram: whether second moments are taken, for a basis.
    """
    done = Checkpoints(directory)
    if (kept := done.load(NAME)) is not None:
        return ResidualStream(kept["absolute"], kept.get("gram"))
    readers, parts = norms(model, adapter), list(chunks(tokens))
    width = readers[0].get_parameter("weight").numel()
    squares = torch.zeros(len(readers), width, dtype=torch.float64)
    sums: dict[torch.device, Tensor] = {}  # by the device that a norm is on

    def listen(place: int, norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        squares[place] += precise(out).abs().mean(1, dtype=torch.float64).square().sum(0).cpu()
        if gram:
            x = precise(args[0]).flatten(0, -2)
            x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
            if x.device not in sums:
                sums[x.device] = torch.zeros(width, width, dtype=torch.float64, device=x.device)
            add_product(sums[x.device], x, x)

    with ExitStack() as stack, progress.stage("width", len(parts)) as stage:
        for place, norm in enumerate(readers):
            stack.enter_context(norm.register_forward_hook(partial(listen, place)))
        for ids in parts:
            model.base_model(ids.to(next(model.parameters()).device), use_cache=False)
            stage.advance()
    found = {"absolute": (squares / len(tokens)).sqrt()}
    if gram:
        found["gram"] = torch.stack([each.cpu() for each in sums.values()]).sum(0) / tokens.n_tokens
    done.save(NAME, found)
    return ResidualStream(found["absolute"], found.get("gram"))
