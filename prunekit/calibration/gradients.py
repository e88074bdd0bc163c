"""Gradients of the dense model's loss, one block at a time: block inputs are kept, blocks are run again backwards.

Only one block's gradients are ever in memory; they go to disk, and the calibration pass reads those of
a site when it gets there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunekit.calibration.moments import multiplied, precise
from prunekit.data.tokens import TokenBatch
from prunekit.errors import CannotGoOn, WrongInput
from prunekit.models.blocks import Call, chunks, entered
from prunekit.plugins.adapter import ModelAdapter
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.memory import Room
from prunekit.system.progress import Progress


@dataclass(frozen=True, eq=False)
class Gradients:
    """E[∂L/∂W] and E[(∂L/∂W)²] over windows, of every linear map a site cuts; float32 or better, on disk.

    L is the mean next-token cross-entropy of one window, in nats. A block's file has its name only when it is
    whole, so a pass that was killed goes on with the blocks it lacks.
    """

    directory: Path

    def read(
        self, block: int, path: str, device: torch.device
    ) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, "d_out d_in"]]:
        """(gradient, fisher) of the linear map at `path` in a block.

        Raises:
            CannotGoOn: its file is missing or damaged.
        """
        try:
            with safe_open(self._file(block), "pt", device=str(device)) as file:
                return file.get_tensor(f"{path}.gradient"), file.get_tensor(f"{path}.fisher")
        except (OSError, SafetensorError) as error:
            raise CannotGoOn(
                f"{self._file(block)} is missing or damaged; remove {self.directory} to collect again"
            ) from error

    @classmethod
    def collected(
        cls,
        model: nn.Module,
        adapter: ModelAdapter,
        tokens: TokenBatch,
        directory: Path,
        progress: Progress,
        room: Room | None = None,
    ) -> Gradients:
        """Go through the model once forwards and once backwards, unless that was done before.

        What enters every block is kept in `room`.

        Raises:
            WrongInput: the windows have no next token, or the loss is not finite.
        """
        self = cls(directory)
        directory.mkdir(parents=True, exist_ok=True)
        blocks = adapter.blocks(model)
        there = {b for b in range(len(blocks)) if Checkpoints(directory).intact(self._file(b).stem)}
        if len(there) == len(blocks):
            return self
        if tokens.seqlen < 2:
            raise WrongInput("gradients need windows of two tokens or more; raise --seqlen")
        device, room = next(model.parameters()).device, room or Room()
        calls, inputs = list[list[Call]](), [room.row()]  # by block, chunk by chunk, in the host's memory
        with progress.stage("gradients", 2 * len(blocks)) as stage, torch.no_grad():
            for ids in chunks(tokens):
                hidden, made = entered(model, adapter, ids)
                inputs[0].append(hidden.cpu())
                calls.append(made)
            for b, block in enumerate(blocks):
                leaving = (made[b](block, h.to(device)).cpu() for made, h in zip(calls, inputs[b], strict=True))
                inputs.append(room.row(leaving))
                stage.advance()
            slopes = room.row()  # ∂(length - 1)L/∂h by chunk, h what leaves the block that is next
            for ids, hidden in zip(chunks(tokens), inputs.pop(), strict=True):
                slopes.append(_slope(model, adapter, hidden.to(device), ids.to(device)))
            for b in reversed(range(len(blocks))):
                sums: dict[str, tuple[Tensor, Tensor]] = {}
                wanted = sorted(sum(adapter.stages(blocks[b]), ())) if b not in there else []
                for i, hidden in enumerate(inputs.pop()):
                    slopes[i] = _backwards(blocks[b], calls[i][b], hidden.to(device), slopes[i], wanted, sums)
                if b not in there:
                    self._write(b, sums, len(tokens))
                stage.advance()
        return self

    def _file(self, block: int) -> Path:
        return self.directory / f"block-{block}.safetensors"

    def _write(self, block: int, sums: dict[str, tuple[Tensor, Tensor]], windows: int) -> None:
        means = {}
        for path, (gradient, fisher) in sums.items():
            means[f"{path}.gradient"] = gradient / windows
            means[f"{path}.fisher"] = fisher / windows
        Checkpoints(self.directory).save(self._file(block).stem, means)


def _slope(
    model: nn.Module,
    adapter: ModelAdapter,
    hidden: Float[Tensor, "windows length d"],
    ids: Int64[Tensor, "windows length"],
) -> Float[Tensor, "windows length d"]:
    """∂(length - 1)L/∂h of every window, h what leaves the last block: the sum, which half precision can hold."""
    found = []
    for left, own in zip(hidden.split(1), ids, strict=True):  # logits are wide: one window's at a time
        with torch.enable_grad():
            window = left.detach().requires_grad_()
            logits = adapter.logits(model, window)[0, :-1]
            loss = functional.cross_entropy(precise(logits), own[1:], reduction="sum")
            (slope,) = torch.autograd.grad(loss, window)
        if not bool(torch.isfinite(slope).all()):
            raise WrongInput("the loss on a calibration window has no finite gradient; try --dtype float32")
        found.append(slope)
    return torch.cat(found)


def _backwards(
    block: nn.Module,
    call: Call,
    hidden: Float[Tensor, "windows length d"],
    slope: Float[Tensor, "windows length d"],
    paths: list[str],
    sums: dict[str, tuple[Tensor, Tensor]],
) -> Float[Tensor, "windows length d"]:
    """∂(length - 1)L/∂h of what enters the block; ∂L/∂W of its maps at `paths` goes into `sums`, and its square.

    Windows go together, yet each has a gradient of its own: for y = W x it is Σ_t ∂L/∂y_t x_tᵀ over its tokens.
    """
    # the other attention kernels add up in no fixed order on CUDA
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _caught(block, paths) as caught:
        hidden = hidden.detach().requires_grad_()
        out = call(block, hidden)
        into, *outof = torch.autograd.grad(out, [hidden, *(y for _, y in caught.values())], slope)
    for path, (x, _), dy in zip(caught, caught.values(), outof, strict=True):
        for own_x, own_dy in zip(_by_window(x.detach(), hidden), _by_window(dy, hidden), strict=True):
            gradient = multiplied(own_dy, own_x) / (hidden.shape[1] - 1)
            if path not in sums:
                sums[path] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            sums[path][0].add_(gradient)
            sums[path][1].addcmul_(gradient, gradient)
    return into


@contextmanager
def _caught(block: nn.Module, paths: list[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within: what the linear maps of the block receive and give, by path, in the order of the graph."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(path: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        caught[path] = args[0], out

    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(block.get_submodule(path).register_forward_hook(partial(catch, path)))
        yield caught


def _by_window(values: Tensor, hidden: Tensor) -> Float[Tensor, "windows length d"]:
    """Some blocks flatten windows into one row of tokens."""
    return values.reshape(len(hidden), hidden.shape[1], -1)
