"""Gradients of the dense model's loss, one block at a time: block inputs are kept, blocks are run again backwards.

Only one block's gradients are ever in memory; they go to disk, and the calibration pass reads those of
a site when it gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunekit.calibration.moments import add_product, multiplied, precise
from prunekit.data.tokens import TokenBatch
from prunekit.errors import CannotGoOn, WrongInput
from prunekit.models.blocks import Call, chunks, entered
from prunekit.models.spread import place_of
from prunekit.plugins.adapter import ModelAdapter
from prunekit.space.sites import Site
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.memory import Room
from prunekit.system.progress import Progress

FISHER_TOKENS = 16_384  # of calibration, at most, that Fisher matrices are taken of
TOGETHER = 256  # of the vocabulary, whose probabilities are summed before those of each


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
        gradient, fisher = _read(self.directory, block, [f"{path}.gradient", f"{path}.fisher"], device)
        return gradient, fisher

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

        def wanted(block: int) -> list[str]:
            return sorted(sum(adapter.stages(adapter.blocks(model)[block]), ()))

        def add(sums: Sums, path: str, x: Tensor, dy: Tensor) -> None:
            for own_x, own_dy in zip(x, dy, strict=True):  # windows go together, yet each has a gradient of its own
                gradient = multiplied(own_dy, own_x) / (tokens.seqlen - 1)  # for y = W x it is Σ_t ∂L/∂y_t x_tᵀ
                for name, term in (("gradient", gradient), ("fisher", gradient.square())):
                    key = f"{path}.{name}"
                    sums[key] = sums[key].add_(term) if key in sums else term

        backwards(
            model, adapter, tokens, directory, wanted, add, mean=lambda total: total / len(tokens), labels=None,
            label="gradients", progress=progress, room=room or Room(),
        )  # fmt: skip
        return self


@dataclass(frozen=True, eq=False)
class OutputFisher:
    """F = E[g gᵀ] of the output y of every site's linear map, g = ∂(-Σ_t log p(ŷ_t))/∂y at a token; on disk.

    Labels ŷ are sampled from the model, token by token: the true Fisher matrix, so that ½ E[δᵀ F δ] is to second order
    the divergence, in nats per token, from the model to one whose output there is off by δ. Float32, d_out × d_out.
    """

    directory: Path

    def read(self, block: int, path: str, device: torch.device) -> Float[Tensor, "d_out d_out"]:
        """F of the linear map at `path` in a block.

        Raises:
            CannotGoOn: its file is missing or damaged.
        """
        return _read(self.directory, block, [path], device)[0]

    @classmethod
    def collected(
        cls,
        model: nn.Module,
        adapter: ModelAdapter,
        sites: Sequence[Site],
        tokens: TokenBatch,
        seed: int,
        directory: Path,
        progress: Progress,
        room: Room | None = None,
    ) -> OutputFisher:
        """Go through the model once forwards and once backwards, unless that was done before.

        What enters every block is kept in `room`.

        Raises:
            WrongInput: the windows have no next token, or the likelihood is not finite.
        """
        self = cls(directory)
        paths: dict[int, set[str]] = {}  # by block
        for site in sites:
            paths.setdefault(site.block, set()).add(adapter.cuts(adapter.blocks(model)[site.block], site)[-1].path)

        def add(sums: Sums, path: str, _: Tensor, dy: Tensor) -> None:
            g = dy.flatten(0, -2)
            if path not in sums:
                sums[path] = torch.zeros(g.shape[1], g.shape[1], dtype=torch.float64, device=g.device)
            add_product(sums[path], g, g)

        backwards(
            model, adapter, tokens, directory, lambda block: sorted(paths.get(block, ())), add,
            mean=lambda total: (total / tokens.n_tokens).float(), labels=torch.Generator().manual_seed(seed),
            label="fisher", progress=progress, room=room or Room(),
        )  # fmt: skip
        return self


Sums = dict[str, Tensor]
"""What is added up of a block, by name."""


def _name(block: int) -> str:
    return f"block-{block}"


def _read(directory: Path, block: int, names: Sequence[str], device: torch.device) -> list[Tensor]:
    file = directory / f"{_name(block)}.safetensors"
    try:
        with safe_open(file, "pt") as tensors:
            return [tensors.get_tensor(name).to(device) for name in names]
    except (OSError, SafetensorError) as error:
        raise CannotGoOn(f"{file} is missing or damaged; remove {directory} to collect again") from error


def backwards(
    model: nn.Module,
    adapter: ModelAdapter,
    tokens: TokenBatch,
    directory: Path,
    wanted: Callable[[int], list[str]],
    add: Callable[[Sums, str, Tensor, Tensor], None],
    *,
    mean: Callable[[Tensor], Tensor],
    labels: torch.Generator | None,
    label: str,
    progress: Progress,
    room: Room,
) -> None:
    """Go through the model once forwards and once backwards, one block at a time, and write what is added up.

    Args:
        model: the dense model.
        adapter: of its family.
        tokens: whole windows go together.
        directory: has a file for every block; those that are there and whole are not made again.
        wanted: the paths of the linear maps of a block that are looked at.
        add: given the sums of the block, the path of a map, what it receives and the slope ∂(length - 1)L/∂y of what it
            makes, both (windows, inputs of a window, d).
        mean: what is written of a sum.
        labels: whose next tokens L is the loss of: sampled from the model with this generator; None: those of the text.
        label: of the stage.
        progress: advanced at every block, twice.
        room: where hidden states are kept.

    Raises:
        WrongInput: the windows have no next token, or the loss is not finite.
    """
    blocks, done = adapter.blocks(model), Checkpoints(directory)
    there = {b for b in range(len(blocks)) if done.intact(_name(b))}
    if len(there) == len(blocks):
        return
    if tokens.seqlen < 2:
        raise WrongInput("gradients need windows of two tokens or more; raise --seqlen")
    device = next(model.parameters()).device
    places = [place_of(block, device) for block in blocks]
    calls, inputs = list[list[Call]](), [room.row()]  # by block, chunk by chunk, in the host's memory
    with progress.stage(label, 2 * len(blocks)) as stage, torch.no_grad():
        for ids in chunks(tokens):
            hidden, made = entered(model, adapter, ids)
            inputs[0].append(hidden.cpu())
            calls.append(made)
        for b, block in enumerate(blocks):
            leaving = (made[b](block, h.to(places[b])).cpu() for made, h in zip(calls, inputs[b], strict=True))
            inputs.append(room.row(leaving))
            stage.advance()
        slopes = room.row()  # ∂(length - 1)L/∂h by chunk, h what leaves the block that is next
        for ids, hidden in zip(chunks(tokens), inputs.pop(), strict=True):
            slopes.append(_slope(model, adapter, hidden.to(device), ids.to(device), labels))
        for b in reversed(range(len(blocks))):
            sums: Sums = {}
            for i, hidden in enumerate(inputs.pop()):
                paths, entering = wanted(b) if b not in there else [], hidden.to(places[b])
                maps = {path: adapter.map_at(blocks[b], path) for path in paths}
                slopes[i] = _backwards(blocks[b], calls[i][b], entering, slopes[i], maps, partial(add, sums))
            if b not in there:
                done.save(_name(b), {name: mean(total) for name, total in sums.items()})
            stage.advance()


def _slope(
    model: nn.Module,
    adapter: ModelAdapter,
    hidden: Float[Tensor, "windows length d"],
    ids: Int64[Tensor, "windows length"],
    labels: torch.Generator | None,
) -> Float[Tensor, "windows length d"]:
    """∂(length - 1)L/∂h of every window, h what leaves the last block: the sum, which half precision can hold."""
    found = []
    for left, own in zip(hidden.split(1), ids, strict=True):  # logits are wide: one window's at a time
        with torch.enable_grad():
            window = left.detach().requires_grad_()
            logits = adapter.logits(model, window)[0, :-1]
        off = torch.softmax(precise(logits.detach()), -1)  # same as: the gradient of cross_entropy, in fewer passes
        asked = own[1:] if labels is None else sampled(off, labels)
        off.scatter_add_(1, asked[:, None], off.new_full((len(off), 1), -1.0))  # p - 1 at what is asked
        (slope,) = torch.autograd.grad(logits, window, off.to(logits.dtype))
        if not bool(torch.isfinite(slope).all()):
            raise WrongInput("the loss on a calibration window has no finite gradient; try --dtype float32")
        found.append(slope)
    return torch.cat(found)


def sampled(probabilities: Float[Tensor, "tokens vocabulary"], generator: torch.Generator) -> Int64[Tensor, " tokens"]:
    """One token at every position, as probable as is said; the generator is the CPU's on every device.

    Sums are float64: of `TOGETHER` of the vocabulary first, then of each in those that the draw falls into.
    """
    device, last = probabilities.device, probabilities.shape[1] - 1
    drawn = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64).to(device)
    below = torch.stack([some.sum(1, dtype=torch.float64) for some in probabilities.split(TOGETHER, 1)], 1).cumsum_(1)
    drawn *= below[:, -1:]
    part = torch.searchsorted(below, drawn).clamp_max_(below.shape[1] - 1)
    drawn -= torch.where(part > 0, below.gather(1, (part - 1).clamp_min_(0)), 0)
    ids = part * TOGETHER + torch.arange(TOGETHER, device=device)
    within = torch.where(ids <= last, probabilities.gather(1, ids.clamp_max(last)), 0).double().cumsum_(1)
    return ids.gather(1, torch.searchsorted(within, drawn).clamp_max_(TOGETHER - 1)).squeeze(1).clamp_max_(last)


def _backwards(
    block: nn.Module,
    call: Call,
    hidden: Float[Tensor, "windows length d"],
    slope: Float[Tensor, "windows length d"],
    maps: Mapping[str, nn.Linear],
    add: Callable[[str, Tensor, Tensor], None],
) -> Float[Tensor, "windows length d"]:
    """∂(length - 1)L/∂h of what enters the block; its `maps`, by path, are added on the way."""
    # the other attention kernels add up in no fixed order on CUDA; on a CPU they do, and are faster
    plain = sdpa_kernel(SDPBackend.MATH) if hidden.is_cuda else nullcontext()
    with torch.enable_grad(), plain, _caught(maps) as caught:
        hidden = hidden.detach().requires_grad_()
        out = call(block, hidden)
        into, *outof = torch.autograd.grad(out, [hidden, *(y for _, y in caught.values())], slope)
    for path, (x, _), dy in zip(caught, caught.values(), outof, strict=True):
        linear = maps[path]
        inputs = x.detach().reshape(len(hidden), -1, linear.in_features)  # some blocks flatten windows
        add(path, inputs, dy.reshape(len(hidden), -1, linear.out_features))
    return into


@contextmanager
def _caught(maps: Mapping[str, nn.Linear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within: what linear maps of a block receive and give, by path, in the order of the graph."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(path: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        caught[path] = args[0], out

    with ExitStack() as stack:
        for path, linear in maps.items():
            stack.enter_context(linear.register_forward_hook(partial(catch, path)))
        yield caught
