"""Prune while adapters are trained, by an importance that is estimated from the adapters' own slopes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit import Effort, GateProblem, GateQuery, Learner, Lesson, Training, check_choices

MEMORY = 0.9  # of the moving mean
EPSILON = 1e-8  # beside a norm


@dataclass(frozen=True)
class LoRAPrune(Learner):
    """Train W + (alpha / rank) B A, and let go what matters least by what A and B tell of the slope at W.

        ĝ = g_B A + B g_A - g_B g_A                          estimate of ∂loss/∂W; g_A, g_B slopes at A and B   (1)
        I_u = Σ over maps of  Σ_{w of u} |ĝ w| / ‖that of all groups of the map‖₂                            (2)
        S ← 0.9 S + 0.1 I                                    at every step                                   (3)
        m ← the best set by S under the limit, within m      every `every` steps                             (4)
        limit: dense until `warmup` of the steps, the budget from 1 - `cooldown` on, between them
               budget + (dense - budget)(1 - share)³                                                         (5)

    `compare: site` ranks within a site, and all sites keep the same share of their price, as far as the exact budget
    lets them. With `all` the sums of (2) are not divided, and the set of (4) is the knapsack of S over all sites.
    At B = 0 (1) is the true slope projected on the rows of A, times alpha / rank: what adapters cannot change they do
    not see. Merged adapters are the trained weights.

    Source: LoRAPrune (arXiv 2305.18403) and its released code: rank 8, alpha 16, a rate of 1e-4 that falls to 0 in a
    line, 128 windows of up to 512 tokens a step, two epochs of 20 thousand. We differ: the last limit is the budget,
    exactly, where the code prunes only while the ratio is below the one that is asked; heads are those of the model
    (the code counts 32), with their own keys and values; no dropout; the rate is for a few hundred steps. Its sparing
    of the first tenth of the blocks and the last is `spare` of a recipe.
    """

    misses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("linear", "flat", "pairs"), "it ranks within a site, and all sites keep one share"
    )

    steps: int = 256
    batch_tokens: int = 1024  # per step; whole windows, at least one
    rate: float = 1e-3  # of AdamW for adapters, at the first step
    rank: int = 8
    alpha: float = 16.0
    every: int = 10  # steps from one set to the next
    warmup: float = 0.1  # share of the steps before anything goes
    cooldown: float = 0.1  # share of the steps under the budget
    compare: Literal["site", "all"] = "site"  # whose groups are ranked together

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.steps, self.batch_tokens, self.rank, self.every) < 1:
            raise ValueError("steps, batch_tokens, rank and every are at least 1")
        if not (self.rate > 0 and self.alpha > 0 and min(self.warmup, self.cooldown) >= 0):
            raise ValueError("rate and alpha are above 0, warmup and cooldown at least 0")
        if self.warmup + self.cooldown >= 1:
            raise ValueError(f"warmup and cooldown leave no step between them: {self.warmup} and {self.cooldown}")

    @property
    def training(self) -> Training:
        return Training(rank=self.rank, alpha=self.alpha, betas=(0.9, 0.999))

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        back = self.steps * seqlen * max(1, min(windows, self.batch_tokens // seqlen))
        return Effort(self.steps, back=back, steps=self.steps)

    def learn(self, problem: GateProblem) -> Lesson:
        mask, score = torch.ones(problem.groups, dtype=torch.bool), torch.zeros_like(problem.price)
        for step, windows in enumerate(problem.batches(self.steps, self.batch_tokens)):
            rate = self.rate * (1 - step / self.steps)
            lora = (yield GateQuery(mask.double(), windows, frozenset({"lora"}), rate=rate)).lora
            assert lora is not None
            score = MEMORY * score + (1 - MEMORY) * self._importance(problem, lora)  # (3)
            share, last = progress((step + 1) / self.steps, self.warmup, self.cooldown), step + 1 == self.steps
            if last or (share > 0 and (step + 1) % self.every == 0):
                mask = problem.project(self._value(problem, score, mask), among=mask, progress=share)  # (4)
        if not bool(mask.any()):
            mask = problem.project(self._value(problem, score, ~mask))
        return [problem.decision(mask)]

    def _importance(self, problem: GateProblem, lora: Float[Tensor, "maps groups"]) -> Float[Tensor, " groups"]:
        """(2)."""
        if self.compare == "all":
            return lora.sum(0)
        parts = [lora[:, problem.site == i] for i in range(len(problem.space.sites))]
        return torch.cat([(part / (part.norm(dim=1, keepdim=True) + EPSILON)).sum(0) for part in parts])

    def _value(self, problem: GateProblem, score: Tensor, mask: Bool[Tensor, " groups"]) -> Float[Tensor, " groups"]:
        """What (4) sums up: the score, or by how many groups of its site a group is better, in its price."""
        if self.compare == "all":
            return score
        place = torch.zeros_like(score)
        for i in range(len(problem.space.sites)):
            here = (problem.site == i).nonzero().flatten()
            order = torch.where(mask[here], score[here], -1.0).argsort(descending=True, stable=True)
            place[here[order]] = 1 - torch.arange(len(here), dtype=torch.float64) / len(here)
        return problem.price * place


def progress(share: float, warmup: float, cooldown: float) -> float:
    """(5): how far the limit has come from the dense price, at 0, to the budget, at 1."""
    inside = (share - warmup) / (1 - warmup - cooldown)
    return 1 - (1 - min(max(inside, 0.0), 1.0)) ** 3
