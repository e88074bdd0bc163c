"""A learner for prunekit: which groups of the whole model stay, learned by gates, in the place of an allocator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import prunekit as pk


@dataclass(frozen=True)
class Template(pk.Learner):
    """Keep the groups of largest integrated gradient, from the dense model to one with nothing left.

        v_u = -∫₀¹ ∂loss/∂g_u (t, ..., t) dt      what is lost by gate u while all gates close together      (1)

    The integral is a mean over midpoints, exact for losses that are quadratic in the gates. The core finds the set of
    largest total value within the budget. Source: Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks,
    arXiv:1703.01365; there for the inputs of a network, here for its groups.
    """

    points: int = 4  # where the gradient is taken
    tokens: int = 4096  # of the text, at every point; whole windows

    def learn(self, problem: pk.GateProblem) -> pk.Lesson:
        """Yield questions about gates, receive replies, return the decision: your method goes here."""
        (windows,) = problem.batches(1, self.tokens)
        value = torch.zeros(problem.groups, dtype=torch.float64)
        for point in range(self.points):
            gates = torch.full((problem.groups,), (point + 0.5) / self.points, dtype=torch.float64)
            reply = yield pk.GateQuery(gates, windows, frozenset({"gradient"}))
            assert reply.gradient is not None  # it was asked for
            value -= reply.gradient / self.points  # (1)
        return [problem.decision(problem.project(value.clamp_min(0)))]

    def effort(self, windows: int, seqlen: int, budgets: int = 1) -> pk.Effort:
        """What `learn` reads, exactly."""
        read = max(1, min(windows, self.tokens // seqlen))
        return pk.Effort(self.points, back=self.points * seqlen * read)
