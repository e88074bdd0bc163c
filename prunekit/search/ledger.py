"""Every question, answer and price as JSON lines; the memory that makes a run resumable.

Every record has a check, over itself and all before it: from the first that was changed on, all are made anew. A run
writes records in an order that depends on nothing but the recipe. A second run of the same recipe meets the records
of the first: where they agree it is replayed, answers included; where they do not, something else has changed and the
run stops.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import CannotGoOn


class LedgerMismatch(CannotGoOn):
    """The ledger holds another conversation."""


class Ledger:
    """An append-only file of records; begins by replaying what the file already holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens = 0  # token-forwards paid, replayed ones included; what is shared was paid elsewhere
        self.trained = 0  # token-forwards that training candidates has taken
        self.questions = 0
        text = path.read_bytes() if path.exists() else b""
        self._past, self._check, length = list[dict[str, Any]](), "", 0
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):  # a killed writer leaves half a line
            record = _record(line)
            if record is None or record.pop("check", None) != (check := self._next(record)):
                break
            self._past.append(record)
            self._check, length = check, length + len(line)
        self.damaged = len(self._past) + 1 if b"\n" in text[length:] else None  # the first line that was changed
        if length != len(text):
            with path.open("r+b") as file:
                file.truncate(length)
        self._met = 0
        self._count = 0  # of records that were met or written

    def note(self, record: Mapping[str, Any]) -> None:
        """A record without an answer: a space, a choice."""
        if self._meet(dict(record)) is None:
            self._append(record)

    def train(self, label: str, tokens: int) -> None:
        """Candidates of a calibration pass were trained on so many token-forwards, which limit no search."""
        self.note({"kind": "training", "pass": label, "tokens": tokens})
        self.trained += tokens

    def recall(self, question: Mapping[str, Any]) -> float | None:
        """The recorded answer to a question, or None: it is new."""
        record = self._meet(dict(question), answer="loss")
        if record is None:
            return None
        return self._account(record)

    def answer(self, question: Mapping[str, Any], loss: float) -> None:
        """Record the answer to a new question."""
        record = dict(question) | {"loss": loss if math.isfinite(loss) else None}
        self._append(record)
        self._account(record)

    def once(self, question: Mapping[str, Any], answer: Callable[[], Any]) -> Any:
        """The recorded answer to a question that is not about losses; `answer()`, put on record, where it is new."""
        record = self._meet(dict(question), answer="answer")
        if record is None:
            record = json.loads(json.dumps(dict(question) | {"answer": answer()}))  # now as it will be read
            self._append(record)
        return record["answer"]

    @property
    def past(self) -> Sequence[Mapping[str, Any]]:
        """The records that the file held when it was opened."""
        return self._past

    def followed_by(self, other: Ledger) -> Ledger:
        """Take over the records that another ledger began with, behind all so far, to be replayed.

        Returns:
            This ledger, opened again: what was met so far is met, what was taken over is ahead.
        """
        here = self._count
        for record in other.past:
            self.note(record)
        again = Ledger(self.path)
        again._met = again._count = here
        return again

    def text(self) -> str:
        """All records on file, as JSON lines."""
        return self.path.read_text(encoding="utf-8") if self.path.exists() else ""

    @property
    def replaying(self) -> bool:
        """Whether records of an earlier run are still ahead."""
        return self._met < len(self._past)

    def _account(self, record: Mapping[str, Any]) -> float:
        self.tokens += 0 if "shared" in record else record["tokens"] + record.get("training", 0)
        self.questions += 1
        return math.inf if record["loss"] is None else float(record["loss"])

    def _meet(self, record: dict[str, Any], answer: str | None = None) -> dict[str, Any] | None:
        if not self.replaying:
            return None
        found = self._past[self._met]
        asked = {key: value for key, value in found.items() if key != answer}
        if asked != json.loads(json.dumps(record)):
            raise LedgerMismatch(
                f"line {self._met + 1} of {self.path} is not what this run would write; "
                "its recipe, data or versions differ: begin again with --overwrite"
            )
        self._met += 1
        self._count += 1
        return found

    def _append(self, record: Mapping[str, Any]) -> None:
        self._count += 1
        self._check = self._next(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "check": self._check}, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _next(self, record: Mapping[str, Any]) -> str:
        """The check of a record that follows those so far: it depends on all of them."""
        line = self._check + json.dumps(record, separators=(",", ":"))
        return hashlib.sha256(line.encode()).hexdigest()[:16]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
