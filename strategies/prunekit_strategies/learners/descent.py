"""Adam on vectors over groups; no method, but the step that learners share."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

SecondMoment = Literal["shared", "own"]


class Adam:
    """x ← x - rate m̂ / (√v̂ + 1e-8) (Kingma & Ba 2015, arXiv 1412.6980).

    With a `shared` second moment v is the mean over the groups of one price: then a step is as long as the gradient is
    large beside those of other groups. With its `own`, every step is about as long as the rate, so that groups are
    ranked by how sure their gradient's sign is and not by how large it is.
    """

    def __init__(
        self, price: Float[Tensor, " groups"], rate: float, betas: tuple[float, float], second_moment: SecondMoment
    ) -> None:
        self.rate, self.betas, self.steps = rate, betas, 0
        self.kind = price.unique(return_inverse=True)[1] if second_moment == "shared" else torch.arange(len(price))
        self.members = torch.bincount(self.kind).double()
        self.first, self.second = torch.zeros_like(price), torch.zeros_like(price)

    def step(self, x: Float[Tensor, " groups"], gradient: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
        """The point after a step."""
        self.steps += 1
        one, two = self.betas
        squares = torch.zeros_like(self.members).index_add_(0, self.kind, gradient.square()) / self.members
        self.first = one * self.first + (1 - one) * gradient
        self.second = two * self.second + (1 - two) * squares[self.kind]
        mean, scale = self.first / (1 - one**self.steps), (self.second / (1 - two**self.steps)).sqrt()
        return x - self.rate * mean / (scale + 1e-8)
