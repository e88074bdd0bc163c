"""Questions with choices, from task files, as windows whose answers are marked.

Every choice of a question is one window: prompt, choice, padding. What stands behind a position has no say in
a causal model's prediction there, so padding needs no mask, and only the answers are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from prunekit.data.blends import Blend, in_shares
from prunekit.data.encoding import Encoder
from prunekit.data.rows import YAML, kind
from prunekit.data.sources import Source
from prunekit.data.tasks import Question, task_rows
from prunekit.data.tokens import Answers, TokenBatch
from prunekit.errors import WrongInput


@dataclass(frozen=True)
class _Choice:
    ids: list[int]
    first: int  # where the answer begins
    right: bool


def drawn(
    encode: Encoder, blend: Blend, tokens: int, seqlen: int, seed: int | None, start: Sequence[int] = ()
) -> TokenBatch:
    """As many questions of each file as its share of `tokens` allows, padded to the longest; shuffled by a seed.

    Args:
        encode: from text to token ids.
        blend: the files, with their shares.
        tokens: at most so many, but at least one question.
        seqlen: tokens of the longest choice with its prompt.
        seed: of the order; None: as in the files.
        start: token ids in front of every prompt.

    Raises:
        WrongInput: a source is no task file, or a row no question.
    """
    stock = {source: list(_questions(source, encode, seqlen, start)) for source in blend}
    if seed is not None:
        for questions in stock.values():
            order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
            questions[:] = [questions[i] for i in order]
    left, asked, origins = {source: iter(questions) for source, questions in stock.items()}, list[list[_Choice]](), []
    for source in in_shares(blend, sum(map(len, stock.values()))):
        if (question := next(left[source], None)) is None:
            break
        asked.append(question)
        origins += [source.label] * len(question)
    return _padded(asked, origins).first(tokens)


def _questions(source: Source, encode: Encoder, seqlen: int, start: Sequence[int]) -> Iterator[list[_Choice]]:
    if not source.is_task:
        raise WrongInput(f"{source} is running text and cannot be mixed with questions in data.search_dataset")
    for asked in _asked(source):
        choices = enumerate(zip(asked.prompts, asked.answers, strict=True))
        yield [_choice(encode, prompt, text, seqlen, start, i == asked.right) for i, (prompt, text) in choices]


def _asked(source: Source) -> Iterator[Question]:
    if kind(source.dataset) not in YAML:
        return (row.question for row in task_rows(source.dataset))
    from prunekit.data.harness import questions  # it needs an extra

    return questions(source.dataset)


def _choice(encode: Encoder, prompt: str, choice: str, seqlen: int, start: Sequence[int], right: bool) -> _Choice:
    """Tokens of prompt and choice together.

    The answer begins where the tokens are no longer those of the prompt alone. Too long a prompt loses its beginning.
    """
    alone, ids = encode(prompt.rstrip()), encode(prompt + choice)
    same = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
    first = max(1, min(same, len(ids) - 1))
    seqlen -= len(start)
    if len(ids) - first >= seqlen or len(ids) < 2:
        raise WrongInput(f"the choice {choice!r:.40} has {len(ids) - first} tokens, windows have {seqlen}")
    cut = max(0, len(ids) - seqlen)
    return _Choice([*start, *ids[cut:]], len(start) + first - cut, right)


def _padded(questions: Sequence[Sequence[_Choice]], origins: Sequence[str]) -> TokenBatch:
    choices = [choice for question in questions for choice in question]
    length = max(len(choice.ids) for choice in choices)
    ids = torch.tensor([choice.ids + [0] * (length - len(choice.ids)) for choice in choices])
    answers = Answers(
        torch.tensor([number for number, question in enumerate(questions) for _ in question]),
        torch.tensor([choice.first for choice in choices]),
        torch.tensor([len(choice.ids) for choice in choices]),
        torch.tensor([choice.right for choice in choices]),
    )
    labels = list(dict.fromkeys(origins))
    return TokenBatch(ids, "+".join(labels), tuple(origins) if len(labels) > 1 else (), answers)
