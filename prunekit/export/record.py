"""What the judged network answered on a few windows: kept beside a result, so that any engine can be compared with it.

A model that is read from an export says nothing about the network that was pruned, measured and reported. So a run
leaves a small record of it: log-probabilities of each next token and of the likeliest few, and a greedy continuation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from prunekit.errors import WrongInput, first_line
from prunekit.plugins.exporter import Inquiry, Response
from prunekit.system.files import read_json, write_bytes, write_json

FOLDER = "judged"  # not beside the weights: servers read all safetensors that lie there
NUMBERS, FACTS = "answers.safetensors", "answers.json"
SCHEMA = 1
JUDGED, OWN = "the network that was judged", "the folder's own model, no judged one"  # what a record is of
FEW = 8  # likeliest tokens at every position
PROMPT, NEW = 32, 16  # tokens of the continued text, at most half of a window; of its continuation


@dataclass(frozen=True, eq=False)
class Record:
    """An inquiry, and what the judged network answered in float32."""

    inquiry: Inquiry  # tokens: the next one of the text, then the likeliest few, descending
    logprobs: Float[Tensor, "windows length few"]  # nats
    continuation: Int64[Tensor, " new_tokens"]
    margins: Float[Tensor, " new_tokens"]  # nats between each of these and the second likeliest
    dtype: str  # of the weights
    parameters: int  # tied ones counted once
    against: str = JUDGED  # whose answers these are

    @classmethod
    def of(
        cls,
        ids: Int64[Tensor, "windows length"],
        logits: Float[Tensor, "windows length vocabulary"],
        dtype: torch.dtype,
        parameters: int,
        continued: tuple[Tensor, Tensor, Tensor] | None = None,
        against: str = JUDGED,
    ) -> Record:
        """Take it from logits.

        Args:
            ids: of the windows.
            logits: in float32.
            dtype: of the weights.
            parameters: tied ones counted once.
            continued: what `continue_greedily` gives; None: nothing was continued.
            against: whose answers these are: `JUDGED` or `OWN`.
        """
        top = logits.topk(min(FEW, logits.shape[-1]), -1).indices
        following = torch.cat([ids[:, 1:], top[:, -1:, 0]], 1)  # behind a window there is no text: the likeliest
        none = torch.zeros(0)
        prompt, new, margins = continued or (none.long(), none.long(), none)
        inquiry = Inquiry(ids, torch.cat([following[..., None], top], -1), prompt, len(new))
        logprobs, _ = Response.read(logits, inquiry)
        return cls(inquiry, logprobs, new, margins, str(dtype).removeprefix("torch."), parameters, against)

    @property
    def gaps(self) -> Float[Tensor, "windows length"]:
        """Nats between the likeliest token and the second, at every position."""
        best = self.logprobs[..., 1:3]
        return best[..., 0] - best[..., -1] if best.shape[-1] > 1 else torch.full(best.shape[:-1], torch.inf)

    def write(self, folder: Path) -> None:
        """Write it into the folder of a result."""
        (folder / FOLDER).mkdir(exist_ok=True)
        whole = {"ids": self.inquiry.ids, "tokens": self.inquiry.tokens, "prompt": self.inquiry.prompt}
        tensors = {name: tensor.int().contiguous() for name, tensor in (whole | {"new": self.continuation}).items()}
        tensors |= {"logprobs": self.logprobs.contiguous(), "margins": self.margins.contiguous()}
        write_bytes(folder / FOLDER / NUMBERS, save(tensors))
        windows, length = self.inquiry.ids.shape
        facts = {
            "schema": SCHEMA,
            "what": f"what {self.against} answered, in float32; log-probabilities in nats",
            "against": self.against,
            "windows": windows,
            "length": length,
            "prompt": len(self.inquiry.prompt),
            "new_tokens": self.inquiry.new_tokens,
            "dtype": self.dtype,
            "parameters": self.parameters,
        }
        write_json(folder / FOLDER / FACTS, facts)

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Read the record of a result; None: it has none.

        Raises:
            WrongInput: it cannot be read.
        """
        if not (folder / FOLDER / FACTS).exists():
            return None
        facts, file = read_json(folder / FOLDER / FACTS), folder / FOLDER / NUMBERS
        try:
            found = load_file(file)
            ids, tokens, prompt, new = (found[name].long() for name in ("ids", "tokens", "prompt", "new"))
            record = cls(
                Inquiry(ids, tokens, prompt, len(new)), found["logprobs"], new, found["margins"],
                str(facts["dtype"]), int(facts["parameters"]), OWN if facts.get("against") == OWN else JUDGED,
            )  # fmt: skip
            if (
                record.logprobs.shape != tokens.shape
                or tokens.shape[:-1] != ids.shape
                or len(new) != len(found["margins"])
            ):
                raise ValueError("its tensors do not belong together")
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise WrongInput(f"{file} cannot be read: {first_line(error)}") from error
        return record


@torch.no_grad()
def continue_greedily(
    logits_of: Callable[[Int64[Tensor, "1 length"]], Float[Tensor, "1 length vocabulary"]],
    window: Int64[Tensor, " length"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue the start of a window with the likeliest tokens, without a cache: what every cache must agree with.

    Args:
        logits_of: the network, in float32.
        window: of the text.

    Returns:
        (the prompt, the new tokens, the margin of each in nats).
    """
    prompt = window[: min(PROMPT, len(window) // 2)]
    text, margins = prompt[None], list[Tensor]()
    for _ in range(min(NEW, len(window) - len(prompt))):
        best = logits_of(text)[0, -1].float().topk(2)
        margins.append(best.values[0] - best.values[1])
        text = torch.cat([text, best.indices[:1, None]], 1)
    return prompt, text[0, len(prompt) :], torch.stack(margins) if margins else torch.zeros(0)
