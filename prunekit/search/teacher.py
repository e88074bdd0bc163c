"""What the dense model predicts for tokens, computed once for all questions about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from prunekit.plugins.objective import Objective, TopLogProbs
from prunekit.system.memory import SHARES, Kept, Room, Shares


class Teacher:
    """What the dense model said, kept for all supernets over it: in memory up to a bound, then in files up to another.

    What came first stays. What neither bound has place for is not kept, and whoever needs it asks the model again.
    """

    def __init__(self, shares: Shares = SHARES, folder: Path | None = None) -> None:
        """Files go to `folder`, or to a temporary one."""
        self.losses: dict[tuple[Objective, str], float] = {}  # of the dense model, by digest of the tokens
        self.room, self._memory, self._files = Room(shares.teacher, folder), shares.teacher, shares.teacher_disk
        self._tops: dict[tuple[str, int], list[tuple[Kept, Kept]]] = {}

    @staticmethod
    def bytes(tokens: int, top: int, vocabulary: int) -> int:
        """Of the most probable tokens at so many positions: an id in int32, a logarithm in float32."""
        return tokens * min(top, vocabulary) * 2 * 4

    def top(self, digest: str, k: int) -> Iterator[TopLogProbs] | None:
        """The k most probable next tokens, piece by piece as they were kept; None: they were not."""
        if (kept := self._tops.get((digest, k))) is None:
            return None
        return (TopLogProbs(ids.get(), log_probs.get()) for ids, log_probs in kept)

    def keep(self, digest: str, k: int, pieces: Sequence[TopLogProbs]) -> None:
        """For the next who asks, all pieces or, where they have no place, none."""
        size = sum(piece.ids.nbytes + piece.log_probs.nbytes for piece in pieces)
        if self.room.held + size <= self._memory or self.room.spilled + size <= self._files:
            put = self.room.put
            self._tops[digest, k] = [(put(piece.ids), put(piece.log_probs)) for piece in pieces]
