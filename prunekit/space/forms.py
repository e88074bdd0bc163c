"""What is removed: whole groups, single weights, or all but n of every m."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from prunekit.errors import WrongInput
from prunekit.space.sites import Units


@dataclass(frozen=True)
class Structure:
    """What is removed: whole groups, weights anywhere, or all but n of every m consecutive weights of a row."""

    units: Units
    kept: int = 0  # n
    block: int = 0  # m

    @classmethod
    def parsed(cls, text: str) -> Structure:
        """groups, weights, or a pattern such as 2:4: two kept of four.

        Raises:
            WrongInput: it is none of them.
        """
        if text in ("groups", "weights"):
            return cls(text)
        kept, colon, block = text.partition(":")
        if colon and kept.isdecimal() and block.isdecimal() and 0 < int(kept) < int(block):
            return cls("n:m", int(kept), int(block))
        raise WrongInput(
            f"no structure {text!r}; there are groups, weights, and patterns N:M that keep N of every M weights, "
            "0 < N < M, such as 2:4"
        )

    @property
    def sparsity(self) -> float:
        """The share that a pattern removes."""
        return float(1 - Fraction(self.kept, self.block))

    def step(self, d_in: int) -> int:
        """What counts of kept weights per row are multiples of, for rows of `d_in` weights.

        Of a pattern, whole weights of every block; quarters of it are fine enough, unless n asks for more.
        """
        if self.units != "n:m":
            return 1
        rungs = math.gcd(self.kept, self.block // 4) if self.block % 4 == 0 else 1
        return d_in // self.block * rungs
