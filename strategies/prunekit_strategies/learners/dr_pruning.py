"""Distributionally robust pruning: the data sets on which the model has lost most are learned from most."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit_strategies.learners.domains import RobustLoading
from prunekit_strategies.learners.hard_concrete import HardConcrete, Loading


@dataclass(frozen=True)
class DRPruning(HardConcrete):
    """`sheared-llama` on data sets whose shares are the worst near a mixture that follows them.

    Equations (1) to (4) are those of `HardConcrete`; those of the shares, of their references and of the mixture are in
    `RobustLoading`. All data sets begin alike.

    Source: DRPruning (arXiv 2411.14055) and its released code, on top of Sheared LLaMA's. What `sheared-llama` does in
    another way than the paper is so here; shares follow the losses of what is learned from, the code's `use_eval:
    false`, and the model is small enough here to hold the fits of (3) in line, for which the code asks a server.
    """

    rho: float = 0.1  # ρ: how far shares may go from the mixture
    least: float = 0.2  # of its part in the mixture, that every data set keeps
    fit: bool = True  # whether references are foretold from the losses so far; False: they are the dense model's

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rho >= 0 and 0 <= self.least < 1):
            raise ValueError(f"rho is at least 0 and least in 0 to 1, not {self.rho} and {self.least}")

    @property
    def unweighed(self) -> str:
        return "learner sheared-llama"

    @property
    def weighs(self) -> bool:
        return True

    def weighing(self, reference: list[float], kept: float) -> Loading:
        n = len(reference)
        return RobustLoading(reference, [1 / n] * n, kept, self.rho, self.least, self.fit)
