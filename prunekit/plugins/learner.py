"""Learners: which groups every site keeps, learned on the whole dense model by gates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.layer.knapsack import Knapsack
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation

Want = Literal["gradient", "taylor", "power"]


@dataclass(frozen=True, eq=False)
class GateProblem:
    """All a learner may see: budgets, and how much text there is. A vector has one number for every group of all sites,
    site by site, in float64 on the host."""

    spaces: tuple[Space, ...]  # every count of every site, under every budget, the largest budget first
    windows: int  # of the text that is learned on
    seqlen: int  # tokens in a window
    seed: int = 0

    @property
    def space(self) -> Space:
        """That of the smallest budget; the only one, unless the learner `nests`."""
        return self.spaces[-1]

    @cached_property
    def knapsacks(self) -> tuple[Knapsack, ...]:
        """The budget arithmetic of every space."""
        return tuple(map(Knapsack, self.spaces))

    @property
    def groups(self) -> int:
        """The length of a vector."""
        return len(self.site)

    @property
    def site(self) -> Int64[Tensor, " groups"]:
        """Number of the site of every group."""
        return self.knapsacks[-1].site

    @property
    def price(self) -> Float[Tensor, " groups"]:
        """Of every group, as `Knapsack.price`."""
        return self.knapsacks[-1].price

    def project(
        self,
        value: Float[Tensor, " groups"],
        *,
        among: Bool[Tensor, " groups"] | None = None,
        progress: float = 1.0,
        budget: int = -1,
    ) -> Bool[Tensor, " groups"]:
        """The set of groups of largest total value within a budget, as `Knapsack.project`; the smallest, unless told
        which of `spaces`."""
        return self.knapsacks[budget].project(value, among=among, progress=progress)

    def euclid(self, point: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
        """The nearest point in [0, 1] that costs the smallest budget, as `Knapsack.euclid`."""
        return self.knapsacks[-1].euclid(point)

    def even(self) -> Float[Tensor, " groups"]:
        """0 at the first group of every site, falling to -1 at its last: it breaks ties so that sites keep equal
        shares."""
        return torch.cat([-torch.linspace(0, 1, n, dtype=torch.float64) for n in self.knapsacks[-1].sizes])

    def decision(self, keep: Bool[Tensor, " groups"], scales: Float[Tensor, " groups"] | None = None) -> Decision:
        """The groups of a mask, and what each kept one is multiplied by."""
        parts = self.knapsacks[-1].split(keep)
        return Decision(tuple(tuple(part.nonzero().flatten().tolist()) for part in parts), scales)

    def batches(self, steps: int, tokens: int, seed: int = 0) -> list[tuple[int, ...]]:
        """Windows for every one of so many steps: as many as hold at most `tokens` tokens, at least one, in an order
        that is drawn anew whenever all have had their turn."""
        size, rng = max(1, min(self.windows, tokens // self.seqlen)), torch.Generator().manual_seed(self.seed + seed)
        drawn: list[int] = []
        while len(drawn) < steps * size:
            drawn += torch.randperm(self.windows, generator=rng).tolist()
        return [tuple(drawn[i * size : (i + 1) * size]) for i in range(steps)]


@dataclass(frozen=True, eq=False)
class GateQuery:
    """A question: what does the dense model lose with these gates?

    Gates multiply what enters the linear map that a site cuts: at 0 a group is as good as removed (where all of a site
    are 0, its bias is too), at 1 it is as it was. The loss, in nats per token, is

        text · CE(next token) + dense · KL(dense ‖ gated)

    over some windows. Beside it a learner may want

        gradient    ∂loss/∂gate
        taylor      Σ |w ∂loss/∂w| over the weights of every group, producer layers included
        power       Σ_ij |w_ij| √E[x_j²] over the columns j of every group: no pass back
    """

    gates: Float[Tensor, " groups"]
    windows: tuple[int, ...] | None = None  # by number; None: all
    want: frozenset[Want] = frozenset()
    text: float = 1.0
    dense: float = 0.0

    @property
    def back(self) -> bool:
        """Whether the answer takes a pass back through the model."""
        return bool(self.want & {"gradient", "taylor"})


@dataclass(frozen=True, eq=False)
class GateReply:
    """The answer; vectors are there when they were wanted."""

    loss: float  # nats per token; inf where it is not finite
    gradient: Float[Tensor, " groups"] | None = None
    taylor: Float[Tensor, " groups"] | None = None
    power: Float[Tensor, " groups"] | None = None


@dataclass(frozen=True, eq=False)
class Decision:
    """What a learner has come to: exactly within a budget."""

    kept: tuple[tuple[int, ...], ...]  # ids of the groups that stay, ascending, by site
    scales: Float[Tensor, " groups"] | None = None  # what a pruner that leaves the weights as they are multiplies by

    @property
    def counts(self) -> Allocation:
        """How many groups of every site stay."""
        return tuple(map(len, self.kept))


@dataclass(frozen=True)
class Effort:
    """What a learner reads."""

    queries: int
    forward: int = 0  # tokens that go through the gated model alone
    back: int = 0  # tokens that go through it and back
    dense: int = 0  # tokens that go through the dense model beside it
    taylor: bool = False  # whether slopes of all weights are held at once


Lesson = Generator[GateQuery, GateReply, Sequence[Decision]]
"""Yields questions, is sent their answers, returns a decision for every space of the problem."""


class Learner(ABC):
    """Decides which groups every site keeps, as a conversation about gates on the dense model."""

    structures: ClassVar[frozenset[str]] = frozenset({"groups"})
    nests: ClassVar[bool] = False  # one conversation decides for every budget of a family, each within the larger

    @abstractmethod
    def learn(self, problem: GateProblem) -> Lesson:
        """Ask with `reply = yield query`; return one decision for every one of `problem.spaces`.

        Deterministic: the seed of the problem is the only source of randomness. Weights are the dense model's
        throughout; what the pruner then makes of the kept groups nobody has learned.
        """

    @abstractmethod
    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        """What `learn` reads of a text of so many windows, for plans: no more, and no less."""

    def check(self, batch: TokenBatch) -> None:
        """Refuse, before any long work, tokens that cannot be learned on; here questions, whose windows are padded.

        Raises:
            WrongInput: says what is needed.
        """
        if batch.answers is not None or batch.seqlen < 2:
            raise WrongInput(
                f"{type(self).__name__} learns on running text in windows of two tokens or more, and {batch.source} "
                "is none; give another data.search_dataset"
            )
