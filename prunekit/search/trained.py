"""A pruned model that has learnt from a little text before it is judged, and answers about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prunekit.data.tokens import TokenBatch
from prunekit.plugins.objective import Answers, Logits, Objective, TopLogProbs
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation


def learn(model: nn.Module, masks: Mapping[str, Bool[Tensor, "d_out d_in"]], text: TokenBatch, rate: float) -> None:
    """Train a model in place on the next tokens of a text, window by window, in order.

    Whoever is trained on one text sees the same windows in the same order, and draws nothing: two models differ by
    their weights alone.

    Args:
        model: all its parameters learn, in their dtype.
        masks: of weights by module; what is False stays zero.
        text: one window a step.
        rate: of AdamW, its other settings torch's own.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in masks}
    adam = torch.optim.AdamW(parameters, lr=rate)
    with torch.enable_grad():
        for window in text.ids:
            ids = window[None].to(parameters[0].device)
            logits = model(input_ids=ids, use_cache=False).logits
            loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
            adam.zero_grad(set_to_none=True)
            loss.backward(inputs=[p for p in parameters if p.requires_grad])
            adam.step()
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.mul_(masks[name])
    adam.zero_grad(set_to_none=True)
    for parameter in parameters:
        parameter.requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Trained:
    """Answers about one allocation after training; all others, and the dense model, are as they were."""

    before: Answers
    allocation: Allocation
    after: Answers  # about the trained model; it has no site

    @property
    def space(self) -> Space:
        return self.before.space

    @property
    def depth(self) -> int:
        return self.before.depth

    def site_errors(self, allocation: Allocation) -> Sequence[float]:
        return self.before.site_errors(allocation)

    def site_nats(self, allocation: Allocation) -> Sequence[float]:
        return self.before.site_nats(allocation)

    def logits(self, allocation: Allocation, batch: TokenBatch) -> Iterator[Logits]:
        trained = allocation == self.allocation
        return self.after.logits((), batch) if trained else self.before.logits(allocation, batch)

    def hidden(
        self, allocation: Allocation, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Float[Tensor, "windows length d"], ...]]:
        trained = allocation == self.allocation
        return self.after.hidden((), batch, depths) if trained else self.before.hidden(allocation, batch, depths)

    def dense_logits(self, batch: TokenBatch) -> Iterator[Logits]:
        return self.before.dense_logits(batch)

    def dense_top(self, batch: TokenBatch, k: int) -> Iterator[TopLogProbs]:
        return self.before.dense_top(batch, k)

    def dense_hidden(
        self, batch: TokenBatch, depths: Sequence[int]
    ) -> Iterator[tuple[Float[Tensor, "windows length d"], ...]]:
        return self.before.dense_hidden(batch, depths)

    def dense_loss(self, objective: Objective, batch: TokenBatch) -> float:
        return self.before.dense_loss(objective, batch)

    def trained(self, allocation: Allocation, batch: TokenBatch, tokens: int, rate: float) -> Answers:
        return self.before.trained(allocation, batch, tokens, rate)
