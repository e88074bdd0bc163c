"""Tokens per second, and size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.models.modules import evaluating

CACHES = ("past_key_values", "cache_params")  # of attention, of state spaces


@dataclass(frozen=True)
class Speed:
    """Tokens per second for one sequence, the median of some repeats."""

    prefill: float
    decode: float
    prompt: int  # tokens read in one pass
    new: int  # tokens made one by one
    device: str


@dataclass(frozen=True)
class Size:
    """Parameters, tied ones once, and bytes of the weights on disk (in memory, when there is no folder)."""

    parameters: int
    bytes: int


@torch.no_grad()
def speed(model: Any, *, prompt: int = 256, new: int = 32, repeats: int = 3) -> Speed:
    """Time one pass over a prompt, and greedy decoding with a cache after it."""
    device = next(model.parameters()).device
    longest = int(getattr(model.config, "max_position_embeddings", prompt + new))
    new = max(1, min(new, longest // 4))
    prompt = max(1, min(prompt, longest - new))
    ids = (
        torch.arange(prompt, device=device)[None] % model.config.vocab_size
    )  # the text does not matter, its length does
    caches = list[dict[str, Any]]()

    def run(token: Tensor, cache: dict[str, Any]) -> Tensor:
        output = model(input_ids=token, use_cache=True, **cache)
        caches.append({name: output[name] for name in CACHES if name in output})
        return output.logits[:, -1:].argmax(-1)

    def read() -> None:
        run(ids, {})

    def write() -> None:
        token = ids[:, -1:]
        for _ in range(new):
            token = run(token, caches.pop())
        caches.pop()

    with evaluating(model):
        _ = read(), write()  # the first time pays for what later ones find ready
        times = [(_seconds(read, device), _seconds(write, device)) for _ in range(repeats)]
    first, rest = (statistics.median(column) for column in zip(*times, strict=True))
    return Speed(prompt / first, new / rest, prompt, new, str(device))


def size(model: nn.Module, directory: str | Path | None = None) -> Size:
    """Exact counts; `directory` is where the model was saved."""
    parameters = list(model.parameters())
    files = list(Path(directory).expanduser().glob("*.safetensors")) if directory is not None else []
    stored = sum(file.stat().st_size for file in files) or sum(p.numel() * p.element_size() for p in parameters)
    return Size(sum(p.numel() for p in parameters), stored)


@torch.no_grad()
def zeros(model: Any) -> float:
    """Share of zeros among the weights of linear maps, the one that makes logits apart."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    total = sum(weight.numel() for weight in weights)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / total if total else 0.0


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun
