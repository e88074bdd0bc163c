"""A question in words, put to every engine that runs a result: what a user of the model would ask it first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from prunekit.errors import NotVerified, WrongInput, first_line
from prunekit.models.opening import load_tokenizer
from prunekit.plugins.exporter import Exporter, Inquiry

NEW = 48  # tokens of an answer at most


@dataclass(frozen=True, eq=False)
class Question:
    """A question as tokens: within the chat template of the folder, or as it is where there is none."""

    tokenizer: Any
    prompt: Int64[Tensor, " prompt"]

    @classmethod
    def of(cls, text: str, folder: Path, *, trust_remote_code: bool = False) -> Question:
        """Make it by the tokenizer in a folder.

        Raises:
            WrongInput: there is none, the template takes no question, or nothing is left of the text.
        """
        tokenizer = load_tokenizer(str(folder), trust_remote_code)
        if getattr(tokenizer, "chat_template", None) is None:
            ids = tokenizer(text)["input_ids"]
        else:
            turns = [{"role": "user", "content": text}]
            try:
                ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            except Exception as error:  # a template is a program of somebody else's
                raise WrongInput(f"the chat template in {folder} takes no question: {first_line(error)}") from error
        if not ids:
            raise WrongInput(f"of the question {text!r} the tokenizer in {folder} leaves no token; ask another")
        return cls(tokenizer, torch.tensor(ids))

    def put(self, exporter: Exporter, folder: Path) -> str:
        """What the engine of a format answers, without its end marks, as JSON has it: on one line, in quotes.

        The engine always takes the likeliest token, and what it says behind an end of text is left out.
        """
        ids = self.prompt[None]
        try:
            said = exporter.answers(
                folder / exporter.place, Inquiry(ids, ids[..., None], self.prompt, NEW)
            ).continuation
        except NotVerified as error:
            return f"none: {first_line(error)}"
        ends = {self.tokenizer.eos_token_id, *_ends(folder)}
        kept = next((at for at, token in enumerate(said.tolist()) if token in ends), len(said))
        return json.dumps(self.tokenizer.decode(said[:kept], skip_special_tokens=True).strip(), ensure_ascii=False)


def _ends(folder: Path) -> list[int]:
    """Ids of tokens that end an answer, as the folder's own files say."""
    try:
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
