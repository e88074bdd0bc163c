"""Projected straight-through gates: every step the best set under the exact budget, every group a score that learns."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prunekit import Effort, GateProblem, GateQuery, GateReply, Learner, Lesson, check_choices
from prunekit_strategies.learners.descent import Adam, SecondMoment

FIRST = 1e-6  # of a score: ties at the start are broken so that all sites keep equal shares


@dataclass(frozen=True)
class GRASPrune(Learner):
    """Learn a score for every group through hard masks that meet the budget at every step.

        p = σ(s / τ)                                                     (1)
        m = the set of largest Σ price · p within the budget             (2)
        s ← Adam(s, ∂loss/∂m · p (1 - p) / τ)                            (3)   gate m + (p - sg p)

    Then, with the mask held, a gate for every kept group that learns in the same way:

        1 + reach · tanh(c)                                              (4)

    Source: GRASPrune (arXiv 2604.19398) and its released code: AdamW at 1e-2 with betas 0.9, 0.99, one window of 512
    tokens a step, 512 of them in four epochs, then one epoch for (4) with reach 0.5. We differ: (2) is the exact
    knapsack and not the longest prefix of the order that fits, which leaves up to a head unspent, and no group is added
    behind the cut, which the released code does where a layer is empty; the gate of a head is on what enters the output
    projection and not on keys and values, where it is a temperature too; (4) is folded there.

    Per-parameter Adam ranks groups by how sure their gradient's sign is, and where the loss is flat around a kept group
    all scores end near a tie. So a second moment may be `shared` by all groups of one price, and the last mask may be
    decided by `occupancy`: the share of steps, behind a first quarter, in which a group was kept. The published form is
    `own` and `score`.
    """

    steps: int = 512
    batch_tokens: int = 512  # per step; whole windows, at least one
    rate: float = 0.03  # of Adam, for scores and for scales
    temperature: float = 1.5  # τ
    betas: tuple[float, float] = (0.9, 0.99)
    second_moment: SecondMoment = "shared"  # by the groups of one price, or each its own
    decide: Literal["occupancy", "score"] = "occupancy"  # of the last mask
    burn_in: float = 0.25  # share of the steps that occupancy leaves out
    scale_steps: int = 0  # for (4); scales count where the pruner leaves the weights as they are
    reach: float = 0.5  # of a scale from 1, at most

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.steps, self.batch_tokens) < 1 or self.scale_steps < 0:
            raise ValueError("steps and batch_tokens are at least 1, scale_steps at least 0")
        if not (self.rate > 0 and self.temperature > 0 and 0 <= self.burn_in < 1 and 0 < self.reach <= 1):
            raise ValueError("rate and temperature are above 0, 0 ≤ burn_in < 1, 0 < reach ≤ 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are in 0 to 1, not {self.betas}")

    @property
    def scaled_by(self) -> str:
        return "scale_steps" if self.scale_steps else ""

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Effort:
        steps = self.steps + self.scale_steps
        return Effort(steps, back=steps * seqlen * max(1, min(windows, self.batch_tokens // seqlen)))

    def learn(self, problem: GateProblem) -> Lesson:
        price, score = problem.price, FIRST * problem.even()
        adam = Adam(price, self.rate, self.betas, self.second_moment)
        occupied, mask = torch.zeros_like(price), torch.ones_like(price)
        for step, windows in enumerate(problem.batches(self.steps, self.batch_tokens)):
            p = torch.sigmoid(score / self.temperature)  # (1)
            mask = problem.project(price * p).double()  # (2)
            if step >= self.burn_in * self.steps:
                occupied += mask
            gradient = (yield GateQuery(mask, windows, frozenset({"gradient"}))).gradient
            assert gradient is not None
            score = adam.step(score, gradient * p * (1 - p) / self.temperature)  # (3)
        p = torch.sigmoid(score / self.temperature)
        # on a tie of occupancy the score decides
        worth = p if self.decide == "score" else (occupied + p) / (self.steps + 1)
        keep = problem.project(price * worth)
        scales = yield from self._scales(problem, keep.double())
        return [problem.decision(keep, scales)]

    def _scales(self, problem: GateProblem, mask: Tensor) -> Generator[GateQuery, GateReply, Tensor | None]:
        """(4) for every kept group; None: not asked for."""
        if not self.scale_steps:
            return None
        c = torch.zeros_like(mask)
        adam = Adam(problem.price, self.rate, self.betas, "own")
        for windows in problem.batches(self.scale_steps, self.batch_tokens, seed=1):
            scale = 1 + self.reach * torch.tanh(c)
            gradient = (yield GateQuery(mask * scale, windows, frozenset({"gradient"}))).gradient
            assert gradient is not None
            c = adam.step(c, mask * gradient * self.reach * (1 - torch.tanh(c).square()))
        return mask * (1 + self.reach * torch.tanh(c))
