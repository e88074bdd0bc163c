"""Latents that a U-Net generates with some of its operators removed: what an objective asks about.

To an objective a generated latent is a window of one token whose state has as many channels as the latent has values,
and a denoising step is a block: the last hidden state is the final latent. So `latent-stats` is, as it stands, the
score of LD-Pruner, and no objective learns about diffusion.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.plugins.guard import number, unchanged
from prunekit.plugins.objective import Answers, Logits, Objective, TopLogProbs
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation
from prunekit_strategies.diffusion.unets import Operator, without


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the U-Net is conditioned on, by sample; None: it has no conditions."""

    wanted: Float[Tensor, "samples length d"] | None
    unwanted: Float[Tensor, "1 length d"] | None  # what guidance leads away from; None: no guidance
    guidance: float = 1.0

    def at(self, rows: slice) -> Conditions:
        """Of some samples."""
        return Conditions(None if self.wanted is None else self.wanted[rows], self.unwanted, self.guidance)


@dataclass(frozen=True, eq=False)
class Latents:
    """Answers about a U-Net in which some operators are removed, on seeded noise and the same steps for all."""

    unet: nn.Module  # in eval mode
    scheduler: Any  # of diffusers; copied for every answer, for some remember their last steps
    operators: Sequence[Operator]  # the sites of the space, in its order
    space: Space
    steps: int  # of the scheduler, asked for; some take more evaluations
    noise: Float[Tensor, "samples c h w"]  # standard normal, in the dtype of the computation
    conditions: Conditions
    chunk: int = 8  # samples at a time
    seed: int = 0  # of the noise that a scheduler adds
    _dense: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # by first sample of a chunk

    @property
    def batch(self) -> TokenBatch:
        """All samples, by number."""
        return TokenBatch(torch.arange(len(self.noise))[:, None], "latents")

    @property
    def depth(self) -> int:
        """Denoising steps."""
        return len(self._started().timesteps)

    # -- what the conversation asks -----------------------------------------------------------------

    def judged(
        self, objective: Objective, allocations: Sequence[Allocation], batch: TokenBatch
    ) -> Iterator[tuple[Allocation, float]]:
        """Every allocation once, in order, and what the objective says of it."""
        for allocation in dict.fromkeys(allocations):
            yield allocation, self.loss(objective, allocation, batch)

    def loss(self, objective: Objective, allocation: Allocation, batch: TokenBatch) -> float:
        """What an objective says of an allocation."""
        with unchanged(objective, model=self.unet, tokens=batch.ids, noise=self.noise, dense=self._dense):
            return number(objective, "its loss", objective.loss(self, allocation, batch))

    # -- what the objective asks --------------------------------------------------------------------

    def hidden(
        self, allocation: Allocation, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Float[Tensor, "samples one values"], ...]]:
        """Latents of the pruned U-Net behind the first `depth` steps, one tensor per depth, a few samples at a time."""
        names = [operator.name for operator, kept in zip(self.operators, allocation, strict=True) if not kept]
        for rows in self._chunks(batch):
            with without(self.unet, names):
                states = self._states(rows)
            yield tuple(states[depth - 1].flatten(1)[:, None] for depth in depths)

    def dense_hidden(
        self, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Float[Tensor, "samples one values"], ...]]:
        """The same of the whole U-Net; it is run once."""
        for rows in self._chunks(batch):
            if rows.start not in self._dense:
                self._dense[rows.start] = self._states(slice(rows.start, rows.start + self.chunk))
            states = self._dense[rows.start]
            yield tuple(states[depth - 1][: rows.stop - rows.start].flatten(1)[:, None] for depth in depths)

    def site_errors(self, allocation: Allocation) -> Sequence[float]:
        """Relative output error of every operator: of nothing in its place it is 1, whatever the operator."""
        return [0.0 if kept else 1.0 for kept in allocation]

    def dense_loss(self, objective: Objective, batch: TokenBatch) -> float:
        """What an objective says of the whole U-Net."""
        return self.loss(objective, tuple(1 for _ in self.operators), batch)

    def site_nats(self, allocation: Allocation) -> Sequence[float]:
        raise self._refused("prices of sites in nats")

    def logits(self, allocation: Allocation, batch: TokenBatch) -> Iterator[Logits]:
        raise self._refused("logits")

    def dense_logits(self, batch: TokenBatch) -> Iterator[Logits]:
        raise self._refused("logits")

    def dense_top(self, batch: TokenBatch, k: int) -> Iterator[TopLogProbs]:
        raise self._refused("probabilities of tokens")

    def trained(self, allocation: Allocation, batch: TokenBatch, tokens: int, rate: float) -> Answers:
        raise self._refused("a model that has learnt from text")

    def _refused(self, what: str) -> WrongInput:
        return WrongInput(f"the objective reads {what}, and a U-Net has latents alone; take latent-stats")

    # -- generation ---------------------------------------------------------------------------------

    def _chunks(self, batch: TokenBatch) -> Iterator[slice]:
        count = len(batch)
        assert batch.ids[:, 0].tolist() == list(range(count)), "samples are asked from the first on"
        for first in range(0, count, self.chunk):
            yield slice(first, min(first + self.chunk, count))

    def _started(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        return scheduler

    @torch.no_grad()
    def _states(self, rows: slice) -> tuple[Tensor, ...]:
        """The latents of some samples behind every step, each (samples, c, h, w)."""
        noise = self.noise[rows]
        scheduler, given = self._started(), self.conditions.at(rows)
        more: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:  # of every sample, whatever the chunks are
            seeds = range(self.seed + rows.start, self.seed + rows.start + len(noise))
            more["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents, states = noise * scheduler.init_noise_sigma, []
        for time in scheduler.timesteps:
            predicted = self._predict(scheduler.scale_model_input(latents, time), time, given)
            latents = scheduler.step(predicted, time, latents, return_dict=False, **more)[0].to(noise.dtype)
            states.append(latents)
        return tuple(states)

    def _predict(self, latents: Tensor, time: Tensor, given: Conditions) -> Tensor:
        """What the U-Net predicts at a step, with classifier-free guidance: ε_u + g (ε_c - ε_u)."""
        if given.wanted is None:
            return self.unet(latents, time, return_dict=False)[0]
        conditional = self.unet(latents, time, given.wanted, return_dict=False)[0]
        if given.unwanted is None:
            return conditional
        nothing = given.unwanted.expand(len(latents), -1, -1)
        free = self.unet(latents, time, nothing, return_dict=False)[0]
        return free + given.guidance * (conditional - free)


def make_noise(samples: int, shape: tuple[int, int, int], seed: int) -> Float[Tensor, "samples c h w"]:
    """Standard normal latents; sample i depends on its number and the seed alone.

    Args:
        samples: how many.
        shape: channels, height and width.
        seed: of the first.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(samples)])
