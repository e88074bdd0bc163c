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

Units = Literal["groups", "weights", "n:m", "low-rank", "values"]


@dataclass(frozen=True)
class Form(ABC):
    """What is removed, what a count means, and which counts there are."""

    units: ClassVar[Units]  # what plug-ins say in `structures`
    shrinks: ClassVar[bool]  # parameters leave the model; else a linear map gets zeros
    coupled: ClassVar[bool]  # rows of producer layers go along, of whole sub-layers; else every linear map is a site

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

    def most(self, groups: int, d_in: int, d_out: int) -> int:
        """The count of all there is in a linear map (d_out, d_in) whose columns are so many groups."""
        return groups

    def each(self, d_in: int, d_out: int) -> int:
        """Parameters of a linear map (d_out, d_in) that one more of a count keeps, where nothing else goes along."""
        return d_out

    def whole(self, d_in: int, d_out: int) -> int | None:
        """Parameters of a linear map (d_out, d_in), which is what the largest count stands for; None: as many as counts
        say."""
        return None

    @property
    def parts(self) -> int:
        """Equal parts that the columns of a linear map fall into."""
        return 1

    @abstractmethod
    def describe(self, kept: int, of: int, d_in: int, d_out: int) -> str:
        """A count in words, `of`: all there is."""


@dataclass(frozen=True)
class Groups(Form):
    """Structured pruning: whole groups, heads and neurons, with the rows of producer layers that make them."""

    units = "groups"
    shrinks = True
    coupled = True

    def describe(self, kept: int, of: int, d_in: int, d_out: int) -> str:
        return f"{kept:,} of {of:,}"


@dataclass(frozen=True)
class Weights(Form):
    """Unstructured pruning: single weights anywhere; a count is that of the weights kept per row, in exact mean."""

    units = "weights"
    shrinks = False
    coupled = False

    def describe(self, kept: int, of: int, d_in: int, d_out: int) -> str:
        return f"{kept:,} of {of:,}"


@dataclass(frozen=True)
class Pattern(Form):
    """Semi-structured pruning: of every m consecutive weights of a row, as many are kept; n is the form's own share."""

    units = "n:m"
    shrinks = False
    coupled = False

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

    def describe(self, kept: int, of: int, d_in: int, d_out: int) -> str:
        return f"{kept * self.block // of}:{self.block}"


@dataclass(frozen=True)
class Ranks(Form):
    """Low rank: a linear map becomes two, U (d_out, r) behind V (r, d_in); a count is r, and all there is: the map.

    Ranks whose factors have as many parameters as the map, or more, are no counts: the largest count is the first of
    them, and stands for the map as it is. So a count over the largest is, but for rounding, a share of the parameters.
    """

    units = "low-rank"
    shrinks = True
    coupled = False

    def least(self, d_in: int) -> int:
        return 1  # a factor without rows is no linear map

    def most(self, groups: int, d_in: int, d_out: int) -> int:
        return -(-d_in * d_out // (d_in + d_out))

    def each(self, d_in: int, d_out: int) -> int:
        return d_in + d_out

    def whole(self, d_in: int, d_out: int) -> int:
        return d_in * d_out

    def describe(self, kept: int, of: int, d_in: int, d_out: int) -> str:
        return f"rank {kept:,} of {min(d_in, d_out):,}" if kept < of else "dense"


@dataclass(frozen=True)
class Values(Form):
    """Narrower values: all heads stay, and each adds up fewer numbers than its queries and keys have.

    A count is that of the values of one head, the same for all heads of a layer; all there is: the head as it is. What
    goes with it is in two maps, the one that makes the values and the one behind attention that reads them. The basis
    in which values are counted is any, of every KV head its own.
    """

    units = "values"
    shrinks = True
    coupled = False

    heads: int  # query heads, by which the columns of the map behind attention are read
    kv_heads: int  # by which values are made; they share the query heads evenly

    @property
    def parts(self) -> int:
        return self.heads

    def least(self, d_in: int) -> int:
        return 1  # a map without columns is no linear map

    def most(self, groups: int, d_in: int, d_out: int) -> int:
        return d_in // self.heads

    def each(self, d_in: int, d_out: int) -> int:
        return (self.heads + self.kv_heads) * d_out  # values are made of what attention adds to

    def describe(self, kept: int, of: int, d_in: int, d_out: int) -> str:
        return f"{kept:,} of {of:,} values a head"


GROUPS, WEIGHTS, RANKS = Groups(), Weights(), Ranks()


def parse_form(text: str) -> Form:
    """The form of a recipe's `structure`.

    Args:
        text: groups, weights, low-rank, or a pattern such as 2:4, which keeps two of every four weights.

    Raises:
        WrongInput: it is none of them.
    """
    if (named := next((form for form in (GROUPS, WEIGHTS, RANKS) if form.units == text), None)) is not None:
        return named
    kept, colon, block = text.partition(":")
    if colon and kept.isdecimal() and block.isdecimal() and 0 < int(kept) < int(block):
        return Pattern(int(kept), int(block))
    raise WrongInput(
        f"no structure {text!r}; there are groups, weights, low-rank, and patterns N:M that keep N of every M weights, "
        "0 < N < M, such as 2:4"
    )
