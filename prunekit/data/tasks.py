"""Task files of our own: questions with choices, one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.data.rows import json_rows
from prunekit.errors import WrongInput


@dataclass(frozen=True)
class Question:
    """What is asked: a prompt and an answer for every choice."""

    prompts: tuple[str, ...]  # one for each choice: most tasks repeat the same
    answers: tuple[str, ...]  # as they follow their prompt, with the blank between the two
    right: int  # number of the right choice


@dataclass(frozen=True)
class TaskRow:
    """A line of a task file."""

    prompt: str
    choices: tuple[str, ...]
    right: int  # number of the right choice

    @property
    def between(self) -> str:
        """A blank between prompt and choice, where neither has one."""
        spaced = self.prompt[-1].isspace() or any(choice[0].isspace() for choice in self.choices)
        return "" if spaced else " "

    @property
    def question(self) -> Question:
        """The same as it is asked."""
        answers = tuple(self.between + choice for choice in self.choices)
        return Question((self.prompt,) * len(answers), answers, self.right)


def task_rows(path: str) -> Iterator[TaskRow]:
    """Read a task file.

    Raises:
        WrongInput: a row is no question, or the file cannot be read.
    """
    for number, (_, row) in enumerate(json_rows(Path(path).expanduser()), 1):
        yield TaskRow(*_read(row, f"{path}, question {number}"))


def _read(row: Any, where: str) -> tuple[str, tuple[str, ...], int]:
    """(prompt, choices, number of the right one)."""
    if not isinstance(row, Mapping) or not isinstance(prompt := row.get("prompt"), str) or not prompt.strip():
        raise WrongInput(f"{where}: a question needs a text 'prompt', not {row!r:.60}")
    answer, choices = row.get("answer"), row.get("choices")
    if choices is None and isinstance(answer, str) and answer:
        return prompt, (answer,), 0
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise WrongInput(f"{where}: 'choices' is a list of texts, not {choices!r:.60}")
    return prompt, tuple(choices), _number(answer, choices, where)


def _number(answer: Any, choices: Sequence[str], where: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise WrongInput(
            f"{where}: 'answer' is one of the choices or its number, 0 to {len(choices) - 1}, not {answer!r:.60}"
        )
    return answer
