"""The statistics that come with prunekit, by the names that plug-ins `need`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prunekit.calibration.moments import add_product, precise
from prunekit.errors import PluginError, unknown
from prunekit.layer.statistics import MapShape, Need, Part, Received, Statistic, Sums, Total

Sizes = Mapping[str, tuple[int, ...]]
Sees = frozenset[Part]


@dataclass(frozen=True)
class Mean(Statistic):
    """E[x̂_j]."""

    name: ClassVar[str] = "mean"

    def add(self, sums: Sums, received: Received) -> None:
        sums["sum"] += received.inputs.sum(0, dtype=torch.float64)


@dataclass(frozen=True)
class Variance(Mean):
    """E[x̂_j²] - E[x̂_j]²."""

    name: ClassVar[str] = "variance"

    def finish(self, sums: Sums, total: Total) -> Tensor:
        return (total.power - super().finish(sums, total).square()).clamp_min(0)


@dataclass(frozen=True)
class Absolute(Statistic):
    """The root mean square over windows of the mean |x̂_j| over tokens."""

    name: ClassVar[str] = "absolute"

    def sizes(self, shape: MapShape) -> Sizes:
        return {"squares": (shape.d_in,), "windows": ()}

    def add(self, sums: Sums, received: Received) -> None:
        windows = received.windows
        sums["squares"] += precise(windows).abs().mean(1, dtype=torch.float64).square().sum(0)
        sums["windows"] += len(windows)

    def finish(self, sums: Sums, total: Total) -> Tensor:
        return (sums["squares"] / sums["windows"]).sqrt()


@dataclass(frozen=True)
class Relative(Statistic):
    """E[x̂_j² / ‖y‖²], y the output of the dense map, bias included; where it is silent a token counts 0."""

    name: ClassVar[str] = "relative"
    sees: ClassVar[Sees] = frozenset({"output"})

    def add(self, sums: Sums, received: Received) -> None:
        squared = received.by_token(received.output.double().square()).sum((-2, -1)).unsqueeze(-1)
        squares = received.by_token(received.inputs.double().square()).sum(1)
        shares = torch.where(squared > 0, squares / torch.where(squared > 0, squared, 1), 0)
        sums["sum"] += received.channels * shares.sum(0)  # a mean over tokens, and each counts for all it brings


@dataclass(frozen=True)
class Influence(Statistic):
    """1 - E cos(x, x + f(x)), x the residual stream and f the dense sub-layer on it."""

    name: ClassVar[str] = "influence"
    sees: ClassVar[Sees] = frozenset({"residual", "output"})

    def sizes(self, shape: MapShape) -> Sizes:
        return {"sum": ()}

    def add(self, sums: Sums, received: Received) -> None:
        # of whole tokens; in float64, for 1 - cos of nearly equal vectors cancels
        before, added = (received.by_token(x.double()).flatten(1) for x in (received.residual, received.output))
        turned = 1 - torch.nn.functional.cosine_similarity(self.base(received, before), before + added, dim=-1)
        sums["sum"] += received.channels * turned.sum()

    def base(self, received: Received, before: Tensor) -> Tensor:
        """What the sum is compared with."""
        return before


@dataclass(frozen=True)
class Turn(Influence):
    """1 - E cos(h, x + f(x)), h the residual stream before the block: of the last sub-layer, what the block turns."""

    name: ClassVar[str] = "turn"
    sees: ClassVar[Sees] = frozenset({"residual", "output", "entered"})

    def base(self, received: Received, before: Tensor) -> Tensor:
        return received.by_token(received.entered.double()).flatten(1)


@dataclass(frozen=True)
class Power(Statistic):
    """E[x̂_j²] of what every producer layer receives."""

    name: ClassVar[str] = "power"
    sees: ClassVar[Sees] = frozenset({"producers"})

    def add(self, sums: Sums, received: Received) -> None:
        sums["sum"] += precise(received.inputs).square().sum(0, dtype=torch.float64)


@dataclass(frozen=True)
class Cross(Statistic):
    """R = E[y x̂ᵀ], y = W x what the dense map makes of the dense model's input x.

    Added up as Σ x x̂ᵀ, which maps of one input share, where it is that or the smaller product: W Σ x x̂ᵀ = Σ y x̂ᵀ.
    """

    name: ClassVar[str] = "cross"
    sees: ClassVar[Sees] = frozenset({"dense"})

    @staticmethod
    def by_pairs(shape: MapShape) -> bool:
        """Whether Σ x x̂ᵀ is added up."""
        return shape.shared or shape.d_out > shape.d_in

    def sizes(self, shape: MapShape) -> Sizes:
        return {"pairs": (shape.d_in,) * 2} if self.by_pairs(shape) else {"made": (shape.d_out, shape.d_in)}

    def add(self, sums: Sums, received: Received) -> None:
        dense = received.dense
        for name, total in sums.items():
            add_product(total, dense.inputs if name == "pairs" else dense.product, received.inputs)

    def finish(self, sums: Sums, total: Total) -> Tensor:
        if "made" in sums:
            return sums["made"] / total.tokens
        return (total.weight.double() @ sums["pairs"]).div_(total.tokens)


@dataclass(frozen=True)
class Energy(Statistic):
    """E‖W x‖², x the dense model's input."""

    name: ClassVar[str] = "energy"
    sees: ClassVar[Sees] = frozenset({"dense", "output"})

    def sizes(self, shape: MapShape) -> Sizes:
        return {"sum": ()}

    def add(self, sums: Sums, received: Received) -> None:
        sums["sum"] += precise(received.dense.product).square().sum(dtype=torch.float64)

    def flops(self, shape: MapShape, tokens: int) -> int:
        return 2 * tokens * shape.d_out  # the dense stream is in need of the output anyway


@dataclass(frozen=True)
class Drift(Statistic):
    """D = E[δ x̂ᵀ], δ the dense model's residual stream less the carried one."""

    name: ClassVar[str] = "drift"
    sees: ClassVar[Sees] = frozenset({"dense", "residual"})

    def sizes(self, shape: MapShape) -> Sizes:
        return {"sum": (shape.d_out, shape.d_in)}

    def add(self, sums: Sums, received: Received) -> None:
        add_product(sums["sum"], received.dense.residual - received.residual, received.inputs)


STATISTICS: Mapping[str, tuple[Statistic, ...]] = {
    **{each.name: (each,) for each in (Mean(), Variance(), Absolute(), Relative(), Influence(), Turn(), Power())},
    "cross": (Cross(), Energy()),
    "drift": (Cross(), Energy(), Drift()),  # nothing aims at it alone
    "gram": (),  # every site has it
    "producers": (),  # weights
    "gradient": (),  # of a pass back through the model
    "output-fisher": (),  # of a pass back through the model, on labels sampled from it
    "contrast": (),  # the powers of a second data set
    "sub-layer": (),  # tokens
}
"""What a plug-in may need by name, and what is added up for it; other statistics it names as objects."""

_OURS: dict[str, Statistic | None] = {
    **dict.fromkeys((*STATISTICS, "fisher")),  # comes with the gradient
    **{each.name: each for some in STATISTICS.values() for each in some},
}


def statistics_of(needs: Iterable[Need]) -> tuple[Statistic, ...]:
    """What is to be added up for plug-ins that need so much, besides the gram; in order of names.

    Raises:
        PluginError: there is no such name, or two statistics have one.
    """
    found: dict[str, Statistic] = {}
    for need in needs:
        if isinstance(need, str) and need not in STATISTICS:
            raise PluginError(unknown("statistic", need, STATISTICS))
        for each in STATISTICS[need] if isinstance(need, str) else (need,):
            other = found.setdefault(each.name, each)
            if other != each or _OURS.get(each.name, each) != each:
                raise PluginError(f"{each} has the name of another statistic, {each.name!r}; give it one of its own")
    return tuple(found[name] for name in sorted(found))
