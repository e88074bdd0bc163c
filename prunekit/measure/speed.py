"""Tokens per second, and size."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from prunekit.measure.ratios import FEWEST, Ratio, Spread
from prunekit.measure.rounds import elapsed, interleaved, own_time
from prunekit.models.modules import evaluating, text_config
from prunekit.space.prices import Workload
from prunekit.system.progress import Progress

CACHES = ("past_key_values", "cache_params", "state")  # of attention, of state spaces, of RWKV
PROMPT, READ = 256, 2048  # tokens of a prompt, and of all prompts read in one pass: no more
STEP = 20_000_000  # nanoseconds in which the calls of one pass are no longer most of it; a batch is made larger until
BATCH = 64  # sequences at most
TURN = 250_000_000  # nanoseconds of decoding in a turn
STEPS = 4, 32  # of decoding in a turn: no fewer, no more
ROUNDS, SECONDS = 15, 15.0  # no further round begins after so long

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a model in every round, those of a batch together."""

    prefill: tuple[float, ...]  # of prompts read in one pass, for the next token alone
    decode: tuple[float, ...]  # of tokens made one by one, greedily, from the cache
    work: Workload
    device: str
    threads: int  # on a CPU
    own_time: bool  # time of that one thread, not on the wall: other programs count little

    def as_dict(self) -> dict[str, Any]:
        """Give the medians, the ranges of the middle half, and what was timed, for reports."""
        prefill, decode = Spread.of(self.prefill), Spread.of(self.decode)
        return {
            "prefill_tokens_per_second": prefill.median,
            "prefill_tokens_per_second_middle_half": [prefill.low, prefill.high],
            "decode_tokens_per_second": decode.median,
            "decode_tokens_per_second_middle_half": [decode.low, decode.high],
            "workload": vars(self.work),
            "rounds": len(self.prefill),
            "threads": self.threads,
            "clock": "thread" if self.own_time else "wall",
        }

    @property
    def how(self) -> str:
        """What was timed, and where."""
        where = self.device if self.device != "cpu" else f"{self.threads} CPU thread{'s' * (self.threads > 1)}"
        clock = ", its own time" if self.own_time else ""
        return f"{self.work} on {where}{clock}"

    def __str__(self) -> str:
        return f"{self.how}; medians of {len(self.prefill)} rounds, ± half of the middle half"


@dataclass(frozen=True)
class Size:
    """Parameters, tied ones once, and bytes of the weights on disk (in memory, when there is no folder)."""

    parameters: int
    bytes: int


def speeds(
    models: Mapping[K, Any],
    progress: Progress | None = None,
    *,
    work: Workload | None = None,
    rounds: int = ROUNDS,
    fewest: int = FEWEST,
) -> dict[K, Speed]:
    """Time several causal language models, or one, in interleaved rounds.

    Args:
        models: on one device; the first decides the workload, so it should be the largest.
        progress: told of every turn.
        work: what is timed; without it, what `workload` finds.
        rounds: how many are wanted; after `SECONDS` no further one begins.
        fewest: rounds, however long they take.

    Returns:
        As many speeds for each model as there were rounds, in their order.
    """
    first = next(iter(models.values()))
    chosen = work or workload(first)
    turns = {key: lambda model=model: _turn(model, chosen) for key, model in models.items()}
    found = interleaved(turns, progress or Progress(), "speed", rounds=rounds, fewest=fewest, seconds=SECONDS)
    device = next(first.parameters()).device
    read, made = chosen.batch * chosen.prompt * 1e9, chosen.batch * chosen.new_tokens * 1e9
    told = chosen, str(device), torch.get_num_threads(), own_time(device)
    return {
        key: Speed(tuple(read / a for a, _ in times), tuple(made / b for _, b in times), *told)
        for key, times in found.items()
    }


def workload(model: Any) -> Workload:
    """Choose what is timed of a model: one sequence; of a small model so many that calls are not most of the time."""
    fewest, most = STEPS
    room = int(getattr(text_config(model.config), "max_position_embeddings", None) or PROMPT + most)
    most = max(1, min(most, room // 4))
    batch = 1
    while True:
        prompt = max(1, min(PROMPT, READ // batch, room - most))
        pilot = Workload(batch, prompt, min(fewest, most))
        step = min(timed(model, pilot)[1] for _ in range(2)) // pilot.new_tokens  # the first time pays for much
        if step >= STEP or batch >= BATCH:
            return Workload(batch, prompt, max(pilot.new_tokens, min(most, TURN // max(1, step))))
        batch *= 2


def ratios(speed: Speed, base: Speed) -> dict[str, Any]:
    """Say how many times as fast one is as another that was timed in the same rounds, for reports."""
    found = dict[str, Any]()
    for what, a, b in (("prefill", speed.prefill, base.prefill), ("decode", speed.decode, base.decode)):
        ratio = Ratio.of(a, b)
        found[f"{what}_ratio"], found[f"{what}_ratio_interval"] = ratio.median, [ratio.low, ratio.high]
        found[f"{what}_ratio_clear"] = ratio.clear
    return found


def compared(dense: Speed, pruned: Speed) -> list[tuple[str, str, str, str]]:
    """Make the rows of a table: what, dense, pruned, and their ratio where it is clear."""
    return [
        (f"{what} tokens/s", str(Spread.of(a)), str(Spread.of(b)), str(Ratio.of(b, a)))
        for what, a, b in (("prefill", dense.prefill, pruned.prefill), ("decode", dense.decode, pruned.decode))
    ]


def size(model: nn.Module, directory: str | Path | None = None) -> Size:
    """Count parameters and bytes; `directory` is where the model was saved."""
    parameters = list(model.parameters())
    files = list(Path(directory).expanduser().glob("*.safetensors")) if directory is not None else []
    stored = sum(file.stat().st_size for file in files) or sum(p.numel() * p.element_size() for p in parameters)
    return Size(sum(p.numel() for p in parameters), stored)


@torch.no_grad()
def zeros(model: Any) -> float:
    """Compute the share of zeros in the weights of linear maps, but for the one that makes logits."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    total = sum(weight.numel() for weight in weights)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / total if total else 0.0


def _turn(model: Any, work: Workload) -> tuple[int, int]:
    """Nanoseconds of reading and of decoding, after a pass and a step that do not count."""
    timed(model, Workload(work.batch, work.prompt, 1))
    return timed(model, work)


@torch.no_grad()
def timed(model: Any, work: Workload) -> tuple[int, int]:
    """Measure one run of a workload; its text does not matter.

    Args:
        model: a causal language model.
        work: (batch, prompt) tokens read in one pass, then `new_tokens` made one by one from the cache.

    Returns:
        Nanoseconds of reading, and of decoding.
    """
    device = next(model.parameters()).device
    ids = (torch.arange(work.prompt, device=device) % text_config(model.config).vocab_size).repeat(work.batch, 1)
    seen: list[Any] = []

    def run(**given: Any) -> None:
        seen.append(model(use_cache=work.new_tokens > 0, logits_to_keep=1, **given))

    def write() -> None:
        for _ in range(work.new_tokens):
            last = seen.pop()
            kept = {name: last[name] for name in CACHES if name in last}
            if not kept:
                raise NotImplementedError("it keeps no cache, from which tokens are made one by one")
            run(input_ids=last.logits[:, -1:].argmax(-1), **kept)

    with evaluating(model):
        return elapsed(lambda: run(input_ids=ids), device), elapsed(write, device)
