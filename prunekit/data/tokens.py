"""Windows of token ids: running text, or questions whose answers are marked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from prunekit.errors import WrongInput

LOOKED_AT = 64  # tokens of a window, at equal distances, by which it is known again


@dataclass(frozen=True, eq=False)
class Answers:
    """What windows of questions ask: positions first … last - 1 of a window hold one choice, right or wrong."""

    question: Int64[Tensor, " windows"]  # ascending; the choices of a question stand side by side
    first: Int64[Tensor, " windows"]  # at least 1: an answer has a prompt before it
    last: Int64[Tensor, " windows"]  # padding from here on, which nothing before it sees
    right: Bool[Tensor, " windows"]

    def __getitem__(self, rows: Any) -> Answers:
        return Answers(self.question[rows], self.first[rows], self.last[rows], self.right[rows])


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Windows of token ids and where they are from."""

    ids: Int64[Tensor, "windows seqlen"]
    source: str  # a short label: wikitext2-test; several are joined by +
    origins: tuple[str, ...] = ()  # the label of every window, where there are several
    answers: Answers | None = None  # where the windows are questions, not running text
    lessons: TokenBatch | None = None  # beside text to judge on: that which a model may learn from before

    @property
    def n_tokens(self) -> int:
        return self.ids.numel()

    @property
    def seqlen(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def digest(self) -> str:
        """sha256 of the ids as little-endian int64, and of what is asked where the windows are questions."""
        asked = self.answers
        parts = [self.ids] if asked is None else [self.ids, asked.question, asked.first, asked.last, asked.right]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.cpu().contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    @cached_property
    def parts(self) -> Mapping[str, TokenBatch]:
        """The windows of every source by themselves, in the order of their first."""
        if not self.origins:
            return {self.source: self}
        return {
            name: replace(self.rows([i for i, origin in enumerate(self.origins) if origin == name]), source=name)
            for name in dict.fromkeys(self.origins)
        }

    def first(self, tokens: int | None) -> TokenBatch:
        """The first windows that hold at most `tokens` tokens, and whole questions; at least one. None: all."""
        if tokens is None or tokens >= self.n_tokens:
            return self
        count = max(1, tokens // self.seqlen)
        if self.answers is not None:  # back to where a question begins, or on to the end of the only one
            question = self.answers.question
            count = int((question < question[count]).sum()) or int((question == question[0]).sum())
        return self.rows(list(range(count)))

    def spread(self, tokens: int) -> TokenBatch:
        """As many windows as hold at most so many tokens, at least one, taken from all over at equal distances."""
        count = max(1, tokens // self.seqlen)
        return self if count >= len(self) else self.rows([i * len(self) // count for i in range(count)])

    def begun_with(self, start: Sequence[int]) -> TokenBatch:
        """Windows of text with these ids in the place of their first, so that all other tokens stay where they are.

        Raises:
            WrongInput: they leave no room for text.
        """
        if not start:
            return self
        if len(start) + 2 > self.seqlen:
            raise WrongInput(
                f"windows of {self.seqlen} tokens that begin with BOS hold no text; give a longer data.seqlen"
            )
        ids = self.ids.clone()
        ids[:, : len(start)] = torch.tensor(start)
        return replace(self, ids=ids)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, rows: list[int]) -> TokenBatch:
        """Some windows, by number."""
        origins = tuple(self.origins[i] for i in rows) if self.origins else ()
        several = len(set(origins)) > 1
        return TokenBatch(
            self.ids[rows],
            self.source if several or not origins else origins[0],
            origins if several else (),
            None if self.answers is None else self.answers[rows],
            self.lessons,
        )


def overlap(one: TokenBatch, two: TokenBatch) -> float:
    """The share of windows of the first that are in the second too, wherever that is cut into windows."""
    run, theirs = min(one.seqlen, two.n_tokens), two.ids.cpu().flatten()
    step = -(-run // LOOKED_AT)
    looked_at = range(run - 1, -1, -step)  # from the end: a BOS in front of a long window is not looked at
    marks = torch.randint(-(2**63), 2**63 - 1, (len(looked_at),), generator=torch.Generator().manual_seed(0))
    hashes = torch.zeros(len(theirs) - run + 1, dtype=torch.int64)  # of every run of the second
    for place, mark in zip(looked_at, marks, strict=True):
        hashes += theirs[place : place + len(hashes)] * mark
    return float(torch.isin((one.ids.cpu()[:, list(looked_at)] * marks).sum(1), hashes).double().mean())
