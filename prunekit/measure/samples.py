"""What models write: greedy continuations of fixed prompts, so that one can read what a perplexity does not tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from prunekit.system.progress import Stage

PROMPTS = (
    "The capital of France is a city where",
    "To make a simple tomato sauce, first",
    "Once upon a time, in a village by the sea,",
    "The main reason why the sky looks blue is that",
    "In 1969, two astronauts",
    "A good way to learn a new language is",
    "The old library at the end of the street",
    "Water boils at a lower temperature on a mountain because",
    "She opened the letter, read the first line, and",
    "A computer program is a list of",
)
NEW = 40  # tokens of a continuation, at most
GRAM = 3  # tokens that are looked for again


@dataclass(frozen=True)
class Sample:
    """A prompt, and how a model goes on."""

    prompt: str
    text: str
    repeated: float  # share of runs of three tokens in the continuation that were there before in it


class _Steps(BaseStreamer):
    """Tells a stage of every token that all continuations have grown by."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def put(self, value: Any) -> None:
        self._stage.advance()

    def end(self) -> None:
        pass


@torch.no_grad()
def samples(
    model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, tokens: int = NEW, stage: Stage | None = None
) -> list[Sample]:
    """Let a model continue prompts, always with the likeliest token.

    Args:
        model: in memory, of whatever dtype and device.
        tokenizer: its own.
        prompts: all of them are continued together, the shorter ones behind padding.
        tokens: of a continuation at most; it ends where the model ends it.
        stage: advanced at the prompts and at every token.
    """
    if not prompts:
        return []
    place, asked = next(model.parameters()).device, [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in asked], device=place)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked], device=place)
    ends = getattr(model.generation_config, "eos_token_id", None)
    greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=ends, pad_token_id=0)
    made = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=greedy, streamer=_Steps(stage or Stage())
    )[:, longest:].tolist()
    stops = {*ends} if isinstance(ends, list) else {ends}
    found = list[Sample]()
    for prompt, new in zip(prompts, made, strict=True):
        end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))  # what follows is padding
        text = tokenizer.decode(new[:end], skip_special_tokens=True)
        found.append(Sample(prompt, text, repeated(new[:end])))
    return found


def repeated(ids: Sequence[int]) -> float:
    """Share of runs of `GRAM` tokens that were there before: 0 nothing twice, near 1 a loop."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def side_by_side(dense: Sequence[Sample], pruned: Sequence[Sample]) -> list[dict[str, Any]]:
    """For the report: what both have made of the same prompts, as JSON values."""
    return [
        {"prompt": a.prompt, "dense": a.text, "pruned": b.text, "repeated": {"dense": a.repeated, "pruned": b.repeated}}
        for a, b in zip(dense, pruned, strict=True)
    ]
