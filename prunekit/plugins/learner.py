"""Learners: which groups every site keeps, learned on the whole dense model by gates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.layer.knapsack import Knapsack
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation

Want = Literal["gradient", "taylor", "power", "lora", "aligned", "windows"]
Optimizer = Literal["adamw", "sgd"]


@dataclass(frozen=True)
class Training:
    """How the weights of all blocks are trained along with the gates. Embeddings, the last norm and the head stay.

    What is trained is a copy of the model in float32 or better; all answers are the copy's, but the divergence is from
    the dense model. A question with a `rate` moves the weights once, behind its answer.
    """

    rank: int = 0  # of adapters, in the place of the weights themselves; 0: all parameters of the blocks
    alpha: float = 1.0  # an adapter adds (alpha / rank) B A to a weight: A random from the seed, B zeros
    optimizer: Optimizer = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW; the first alone is the momentum of SGD
    decay: float = 0.0  # of weights; of SGD a part of the gradient
    clip: float = 1.0  # norm of a gradient, at most; 0: any
    reorder: int = 64  # questions after which gates of a pattern are told anew which weights of a block are the largest

    def __post_init__(self) -> None:
        if self.rank < 0 or not (self.alpha > 0 and self.decay >= 0 and self.clip >= 0 and self.reorder >= 1):
            raise ValueError("rank, decay and clip are at least 0, alpha above 0, reorder at least 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are in 0 to 1, not {self.betas}")


@dataclass(frozen=True, eq=False)
class GateProblem:
    """All a learner may see: budgets, and how much text there is. A vector has one number for every group of all sites,
    site by site, in float64 on the host.

    Where a pattern N:M is learned, a group is a rank: the first is the largest weights of all blocks of M, the next the
    second largest, and so on, as many at once as counts are apart. A set then keeps the first ranks of every site.
    """

    spaces: tuple[Space, ...]  # every count of every site, under every budget, the largest budget first
    windows: int  # of the text that is learned on
    seqlen: int  # tokens in a window
    seed: int = 0
    sources: tuple[int, ...] = ()  # number of the data set of every window; (): there is one

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

    @property
    def fixed(self) -> Bool[Tensor, " groups"]:
        """Which groups stay, as `Knapsack.fixed`: their gates are 1 in every question, and so are their scales."""
        return self.knapsacks[-1].fixed

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

    def euclid(
        self, point: Float[Tensor, " groups"], weight: Float[Tensor, " groups"] | None = None
    ) -> Float[Tensor, " groups"]:
        """The nearest point in [0, 1] that costs the smallest budget, as `Knapsack.euclid`."""
        return self.knapsacks[-1].euclid(point, weight)

    def even(self) -> Float[Tensor, " groups"]:
        """0 at the first group of every site, falling to -1 at its last: it breaks ties so that sites keep equal
        shares."""
        return torch.cat([-torch.linspace(0, 1, n, dtype=torch.float64) for n in self.knapsacks[-1].sizes])

    def decision(self, keep: Bool[Tensor, " groups"], scales: Float[Tensor, " groups"] | None = None) -> Decision:
        """The groups of a mask, and what each kept one is multiplied by."""
        parts, steps = self.knapsacks[-1].split(keep), self.knapsacks[-1].steps
        return Decision(
            tuple(tuple(part.nonzero().flatten().tolist()) for part in parts), scales, () if max(steps) == 1 else steps
        )

    @cached_property
    def domains(self) -> tuple[tuple[int, ...], ...]:
        """The windows of every data set."""
        of = self.sources or (0,) * self.windows
        return tuple(tuple(i for i, own in enumerate(of) if own == n) for n in sorted(set(of)))

    def batch(self, tokens: int) -> int:
        """Windows that hold at most so many tokens, at least one."""
        return max(1, min(self.windows, tokens // self.seqlen))

    def batches(self, steps: int, tokens: int, seed: int = 0) -> list[tuple[int, ...]]:
        """Windows for every one of so many steps: as many as hold at most `tokens` tokens, at least one, in an order
        that is drawn anew whenever all have had their turn."""
        size, rng = self.batch(tokens), torch.Generator().manual_seed(self.seed + seed)
        drawn: list[int] = []
        while len(drawn) < steps * size:
            drawn += torch.randperm(self.windows, generator=rng).tolist()
        return [tuple(drawn[i * size : (i + 1) * size]) for i in range(steps)]


@dataclass(frozen=True, eq=False)
class GateQuery:
    """A question: what does the model lose with these gates?

    Gates multiply what enters the linear map that a site cuts: at 0 a group is as good as removed (where all of a site
    are 0, its bias is too), at 1 it is as it was. Those of a pattern multiply the weights of a rank. The loss, in nats
    per token, is

        text · CE(next token) + dense · KL(dense ‖ gated)

    over some windows. Beside it a learner may want

        gradient    ∂loss/∂gate
        taylor      Σ |w ∂loss/∂w| over the weights of every group, producer layers included
        power       Σ_ij |w_ij| √E[x_j²] over the columns j of every group: no pass back
        lora        Σ |ĝ w| over the weights of every group in each of its maps, ĝ = g_B A + B g_A - g_B g_A what
                    adapters tell of ∂loss/∂w, with g their own slopes and w the weight with its adapter
        aligned     Σ ∂loss/∂w ∂loss'/∂w over the columns of every group, loss' on the windows `beside`
        windows     the loss of every window that was asked about

    A learner that trains weights along may give a `rate`: behind the answer they go down the slope of the loss once.
    """

    gates: Float[Tensor, " groups"]
    windows: tuple[int, ...] | None = None  # by number; None: all
    want: frozenset[Want] = frozenset()
    text: float = 1.0
    dense: float = 0.0
    rate: float = 0.0  # of the step that the weights take; 0: none
    beside: tuple[int, ...] = ()  # windows that `aligned` compares with

    @property
    def back(self) -> bool:
        """Whether the answer takes a pass back through the model."""
        return bool(self.want & {"gradient", "taylor", "lora", "aligned"}) or self.rate > 0


@dataclass(frozen=True, eq=False)
class GateReply:
    """The answer; vectors are there when they were wanted."""

    loss: float  # nats per token; inf where it is not finite
    gradient: Float[Tensor, " groups"] | None = None
    taylor: Float[Tensor, " groups"] | None = None
    power: Float[Tensor, " groups"] | None = None
    lora: Float[Tensor, "maps groups"] | None = None  # in the order of the maps of a sub-layer, its own the last
    aligned: Float[Tensor, " groups"] | None = None
    windows: Float[Tensor, " windows"] | None = None


@dataclass(frozen=True, eq=False)
class Decision:
    """What a learner has come to: exactly within a budget."""

    kept: tuple[tuple[int, ...], ...]  # ids of the groups that stay, ascending, by site
    scales: Float[Tensor, " groups"] | None = None  # what a pruner that leaves the weights as they are multiplies by
    steps: tuple[int, ...] = ()  # what a group of every site counts for, where that is a rank; (): 1
    domains: tuple[float, ...] = ()  # share of the text that every data set had in the end; (): the learner weighs none

    @property
    def counts(self) -> Allocation:
        """How many groups of every site stay, or weights of every row."""
        steps = self.steps or (1,) * len(self.kept)
        return tuple(len(groups) * step for groups, step in zip(self.kept, steps, strict=True))


@dataclass(frozen=True)
class Effort:
    """What a learner reads."""

    queries: int
    forward: int = 0  # tokens that go through the gated model alone
    back: int = 0  # tokens that go through it and back
    dense: int = 0  # tokens that go through the dense model beside it
    taylor: bool = False  # whether slopes of all weights are held at once
    steps: int = 0  # that the weights are trained for


Lesson = Generator[GateQuery, GateReply, Sequence[Decision]]
"""Yields questions, is sent their answers, returns a decision for every space of the problem."""


class Learner(ABC):
    """Decides which groups every site keeps, as a conversation about gates on the dense model."""

    structures: ClassVar[frozenset[str]] = frozenset({"groups"})
    nests: ClassVar[bool] = False  # one conversation decides for every budget of a family, each within the larger
    stochastic: ClassVar[bool] = False  # it draws masks, or where it begins: another order of groups, other draws
    misses: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Losses of the suite, `linear`, `flat` or `pairs`, whose best set it is known to miss by far, and why."""

    @property
    def training(self) -> Training | None:
        """How weights are trained along; None, as here: they stay those of the dense model. Whoever nests trains none:
        there would be other weights for every budget."""
        return None

    @property
    def scaled_by(self) -> str:
        """The option, above 0 now, that says how much is read for the scales of its decisions; "", as here: nothing is.

        A run in which nobody takes over such scales is refused.
        """
        return ""

    @abstractmethod
    def learn(self, problem: GateProblem) -> Lesson:
        """Ask with `reply = yield query`; return one decision for every one of `problem.spaces`.

        Deterministic: the seed of the problem is the only source of randomness. Weights are the dense model's
        throughout, unless the learner has a `training`; what the pruner then makes of the kept groups nobody has
        learned.
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
