"""The copy of a model whose blocks are trained beside gates: parameters or adapters, the optimizer, and its state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear as apply
from transformers import PreTrainedModel

from prunekit.models.opening import stored_as
from prunekit.models.paging import whole
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.learner import Training

EPSILON = 1e-8  # of AdamW


class Weights:
    """What is trained of a model: all parameters of its blocks, or B A beside every linear map of them."""

    def __init__(self, model: PreTrainedModel, adapter: ModelAdapter, training: Training, seed: int) -> None:
        self.training, self.count = training, 0  # steps so far
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self.model = stored_as(whole(model), dtype)
        self.model.requires_grad_(False)
        self.adapters: dict[nn.Module, tuple[nn.Parameter, nn.Parameter]] = {}  # A (rank, d_in), B (d_out, rank)
        blocks = adapter.blocks(self.model)
        if training.rank:
            rng = torch.Generator().manual_seed(seed)
            for module in blocks.modules():
                if isinstance(module, nn.Linear):
                    self._adapt(module, rng)
        named = (p for pair in self.adapters.values() for p in pair) if training.rank else blocks.parameters()
        self.parameters: list[nn.Parameter] = list(named)
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters] if training.optimizer == "adamw" else []

    @staticmethod
    def bytes(model: int, trained: int, optimizer: str) -> int:
        """Of a copy of so many parameters, so many of which are trained: values, slopes, what the optimizer knows."""
        return 4 * (model + (4 if optimizer == "adamw" else 3) * trained)

    @property
    def scale(self) -> float:
        """Of B A in a weight."""
        return self.training.alpha / max(1, self.training.rank)

    def weight(self, linear: nn.Module) -> Float[Tensor, "d_out d_in"]:
        """The weight that a linear map of the copy has, with its adapter."""
        weight = linear.get_parameter("weight")
        if linear not in self.adapters:
            return weight
        a, b = self.adapters[linear]
        return weight + self.scale * (b @ a)

    def slope(self, linear: nn.Module, slopes: Mapping[Tensor, Tensor]) -> Float[Tensor, "d_out d_in"]:
        """What the slopes at adapters tell of that at the weight: g_B A + B g_A - g_B g_A."""
        a, b = self.adapters[linear]
        at_a, at_b = slopes[a], slopes[b]
        return at_b @ a + b @ at_a - at_b @ at_a

    @torch.no_grad()
    def step(self, slopes: Sequence[Tensor], rate: float) -> None:
        """Go down once.

        AdamW (Loshchilov & Hutter 2019), or SGD with momentum. The norm of all slopes together is cut first.
        """
        training, (one, two) = self.training, self.training.betas
        self.count += 1
        if training.clip:
            norm = math.sqrt(math.fsum(float(slope.double().square().sum()) for slope in slopes))
            if norm > training.clip:
                slopes = [slope * (training.clip / norm) for slope in slopes]
        for i, (p, slope) in enumerate(zip(self.parameters, slopes, strict=True)):
            if training.optimizer == "sgd":
                self.first[i].mul_(one).add_(slope + training.decay * p)
                p.sub_(rate * self.first[i])
                continue
            p.mul_(1 - rate * training.decay)
            self.first[i].mul_(one).add_(slope, alpha=1 - one)
            self.second[i].mul_(two).addcmul_(slope, slope, value=1 - two)
            spread = (self.second[i] / (1 - two**self.count)).sqrt_().add_(EPSILON)
            p.addcdiv_(self.first[i], spread, value=-rate / (1 - one**self.count))

    def state(self) -> dict[str, Tensor]:
        """All that a later step depends on."""
        kinds = {"value": self.parameters, "first": self.first, "second": self.second}
        tensors = {f"{i}.{kind}": t.detach() for kind, some in kinds.items() for i, t in enumerate(some)}
        return {"count": torch.tensor(self.count), **tensors}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back, or on, to a state."""
        self.count = int(state["count"])
        for kind, some in {"value": self.parameters, "first": self.first, "second": self.second}.items():
            for i, tensor in enumerate(some):
                tensor.copy_(state[f"{i}.{kind}"])

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        """The copy as a plain model: what adapters add is in its weights. It learns no more."""
        for linear in self.adapters:
            linear.get_parameter("weight").copy_(self.weight(linear))
            del linear.forward
        self.adapters.clear()
        self.parameters, self.first, self.second = [], [], []
        return self.model

    def _adapt(self, linear: nn.Linear, rng: torch.Generator) -> None:
        """A uniform within 1/√d_in, as `peft` begins; B zeros: nothing is added yet."""
        weight, rank = linear.weight, self.training.rank
        a = (2 * torch.rand(rank, linear.in_features, generator=rng, dtype=weight.dtype) - 1) / linear.in_features**0.5
        pair = nn.Parameter(a.to(weight.device)), nn.Parameter(weight.new_zeros(linear.out_features, rank))
        self.adapters[linear] = pair

        def forward(x: Tensor) -> Tensor:
            return apply(x, linear.weight, linear.bias) + self.scale * apply(apply(x, pair[0]), pair[1])

        linear.forward = forward  # type: ignore[method-assign]  of this copy alone
