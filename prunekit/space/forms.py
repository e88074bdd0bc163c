"""Forms: what is removed at a site, in integers; `prunekit.layer.layouts` has the tensors.

A new structure is a class here, a class there, and its name in the docs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from prunekit.errors import WrongInput

Units = Literal["groups", "weights", "n:m"]


@dataclass(frozen=True)
class Form(ABC):
    """What is removed, what a count means, and which counts there are."""

    units: ClassVar[Units]  # what plug-ins say in `structures`
    shrinks: ClassVar[bool]  # modules become smaller, with rows of producer layers; else one linear map gets zeros

    @property
    def m(self) -> int:
        """Consecutive weights of a row that share one limit; 0: whole rows."""
        return 0

    @property
    def kept_share(self) -> Fraction | None:
        """The share of all weights that the form itself keeps; None: any."""
        return None

    def step(self, d_in: int) -> int:
        """What counts are multiples of, for rows of `d_in` weights."""
        return 1

    def least(self, d_in: int) -> int:
        """The smallest count."""
        return 0

    @abstractmethod
    def describe(self, kept: int, of: int) -> str:
        """A count in words."""


@dataclass(frozen=True)
class Groups(Form):
    """Structured pruning: whole groups, heads and neurons, with the rows of producer layers that make them."""

    units = "groups"
    shrinks = True

    def describe(self, kept: int, of: int) -> str:
        return f"{kept:,} of {of:,}"


@dataclass(frozen=True)
class Weights(Form):
    """Unstructured pruning: single weights anywhere; a count is that of the weights kept per row, in exact mean."""

    units = "weights"
    shrinks = False

    def describe(self, kept: int, of: int) -> str:
        return f"{kept:,} of {of:,}"


@dataclass(frozen=True)
class Pattern(Form):
    """Semi-structured pruning: of every m consecutive weights of a row, as many are kept; n is the form's own share."""

    units = "n:m"
    shrinks = False

    kept: int  # n
    block: int  # m

    @property
    def m(self) -> int:
        return self.block

    @property
    def kept_share(self) -> Fraction:
        return Fraction(self.kept, self.block)

    def step(self, d_in: int) -> int:
        """Whole weights of every block; quarters of it are fine enough, unless n asks for more."""
        rungs = math.gcd(self.kept, self.block // 4) if self.block % 4 == 0 else 1
        return d_in // self.block * rungs

    def least(self, d_in: int) -> int:
        return self.step(d_in)  # a pattern keeps something of every block

    def describe(self, kept: int, of: int) -> str:
        return f"{kept * self.block // of}:{self.block}"


GROUPS, WEIGHTS = Groups(), Weights()


def parse_form(text: str) -> Form:
    """The form of a recipe's `structure`.

    Args:
        text: groups, weights, or a pattern such as 2:4, which keeps two of every four weights.

    Raises:
        WrongInput: it is none of them.
    """
    if text in ("groups", "weights"):
        return GROUPS if text == "groups" else WEIGHTS
    kept, colon, block = text.partition(":")
    if colon and kept.isdecimal() and block.isdecimal() and 0 < int(kept) < int(block):
        return Pattern(int(kept), int(block))
    raise WrongInput(
        f"no structure {text!r}; there are groups, weights, and patterns N:M that keep N of every M weights, "
        "0 < N < M, such as 2:4"
    )
