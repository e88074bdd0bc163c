"""What a site receives, added up over tokens: counts, sums and second moments.

Moments are additive over batches, devices and machines: add shards, then read means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

VALUES_AT_ONCE = 2**21  # that are made wide at once, to be added: 16 MiB in float64
STRIPS = 8  # of rows, of a symmetric product: each ends at its diagonal, 9/16 of the work of a whole one


@dataclass(eq=False)
class Moments:
    """Running sums over tokens, in float64; products of a batch are added up in float32 or better."""

    tokens: int
    total: Float[Tensor, " d"]  # Σ x̂
    outer: Float[Tensor, "d d"]  # Σ x̂ x̂ᵀ, its lower half: strips of rows as far as their diagonal
    crossed: Float[Tensor, "d_out d"] | None = None  # Σ y x̂ᵀ, y = W x what the dense model's map makes of its input x
    paired: Float[Tensor, "d d"] | None = None  # Σ x x̂ᵀ: where several maps have one input it is cheaper
    power: float = 0.0  # Σ ‖y‖²
    drifted: Float[Tensor, "d_out d"] | None = None  # Σ δ x̂ᵀ, δ the dense residual stream less the carried one
    windows: int = 0
    loudness: Float[Tensor, " d"] | None = None  # Σ over windows of (mean |x̂| over tokens)²
    related: Float[Tensor, " d"] | None = None  # Σ x̂² / ‖y‖², y the linear map's output
    turned: float | None = None  # Σ 1 - cos(x, x + f(x)), x the residual stream and f the sub-layer
    fed: dict[str, Tensor] = field(default_factory=dict)  # Σ x̂² of what every feeder receives, by its name

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Moments:
        """Nothing received yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(0, zeros(width), zeros(width, width))

    def add(self, seen: Float[Tensor, "tokens d"]) -> None:
        """Receive a batch."""
        self.tokens += len(seen)
        self.total += seen.sum(0, dtype=torch.float64)
        wide = seen if seen.is_cuda else precise(seen)
        for strip in strips(seen.shape[1]):
            _added(self.outer[strip, : strip.stop], multiplied(wide[:, strip], wide[:, : strip.stop]))

    def add_made(self, made: Float[Tensor, "tokens d_out"], seen: Float[Tensor, "tokens d"]) -> None:
        """What the dense model's linear map made of its input, bias left out, for the tokens of the last `add`."""
        self.crossed = _with_product(self.crossed, made, seen)
        self.add_power(made)

    def add_paired(self, dense: Float[Tensor, "tokens d"], seen: Float[Tensor, "tokens d"]) -> None:
        """What the dense model's site received for the tokens of the last `add`; for all maps that receive it."""
        self.paired = _with_product(self.paired, dense, seen)

    def add_power(self, made: Float[Tensor, "tokens d_out"]) -> None:
        """What the dense model's linear map made of its input, bias left out."""
        self.power += float(precise(made).square().sum(dtype=torch.float64))

    def made(self, weight: Float[Tensor, "d_out d"]) -> Moments:
        """Of the linear map with this weight, when what its input is paired with is known: Σ y x̂ᵀ = W Σ x x̂ᵀ."""
        return self if self.paired is None else replace(self, crossed=weight.double() @ self.paired, paired=None)

    def add_drift(self, drift: Float[Tensor, "tokens d_out"], seen: Float[Tensor, "tokens d"]) -> None:
        """How far the residual stream is from the dense model's, for the tokens of the last `add`."""
        self.drifted = _with_product(self.drifted, drift, seen)

    def add_absolute(self, seen: Float[Tensor, "windows length d"]) -> None:
        """The windows of the last `add`, one by one."""
        loudness = precise(seen).abs().mean(1, dtype=torch.float64).square().sum(0)
        self.windows += len(seen)
        self.loudness = loudness if self.loudness is None else self.loudness + loudness

    def add_relative(self, seen: Float[Tensor, "tokens d"], output: Float[Tensor, "tokens d_out"]) -> None:
        """What the linear map received and what it made of it, for the tokens of the last `add`; silence counts 0."""
        loud = output.double().square().sum(-1, keepdim=True)
        ratio = torch.where(loud > 0, seen.double().square() / torch.where(loud > 0, loud, 1), 0).sum(0)
        self.related = ratio if self.related is None else self.related + ratio

    def add_influence(self, residual: Float[Tensor, "tokens d_out"], output: Float[Tensor, "tokens d_out"]) -> None:
        """What the sub-layer was added to and what it added, for the tokens of the last `add`."""
        before, added = residual.double(), output.double()  # 1 - cos of nearly equal vectors cancels
        cosines = torch.nn.functional.cosine_similarity(before, before + added, dim=-1)
        self.turned = (self.turned or 0.0) + float((1 - cosines).sum())

    def add_fed(self, feeder: str, seen: Float[Tensor, "tokens d_fed"]) -> None:
        """What a feeder received for the tokens of the last `add`."""
        power = precise(seen).square().sum(0, dtype=torch.float64)
        self.fed[feeder] = self.fed[feeder] + power if feeder in self.fed else power

    def merged(self, other: Moments) -> Moments:
        """Both together."""

        def both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
            return None if one is None or two is None else one + two

        return Moments(
            self.tokens + other.tokens,
            self.total + other.total,
            self.outer + other.outer,
            both(self.crossed, other.crossed),
            both(self.paired, other.paired),
            self.power + other.power,
            both(self.drifted, other.drifted),
            self.windows + other.windows,
            both(self.loudness, other.loudness),
            both(self.related, other.related),
            None if self.turned is None or other.turned is None else self.turned + other.turned,
            {feeder: power + other.fed[feeder] for feeder, power in self.fed.items()},
        )

    def to(self, device: torch.device) -> Moments:
        """The same sums on a device."""
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved, fed={feeder: power.to(device) for feeder, power in self.fed.items()})

    @property
    def mean(self) -> Float[Tensor, " d"]:
        return self.total / self.tokens

    @property
    def gram(self) -> Float[Tensor, "d d"]:
        """H = E[x̂ x̂ᵀ]."""
        return self._mirrored() / self.tokens

    def settled(self) -> Float[Tensor, "d d"]:
        """H in the place of the sums, for the last who asks: of wide maps both are large."""
        return self._mirrored().div_(self.tokens)

    def _mirrored(self) -> Float[Tensor, "d d"]:
        """The sums, upper half and all."""
        for strip in strips(len(self.outer)):
            self.outer[: strip.start, strip] = self.outer[strip, : strip.start].T
        return self.outer

    @property
    def cross(self) -> Float[Tensor, "d_out d"] | None:
        """R = E[y x̂ᵀ]."""
        return None if self.crossed is None else self.crossed / self.tokens

    @property
    def drift(self) -> Float[Tensor, "d_out d"] | None:
        """D = E[δ x̂ᵀ]."""
        return None if self.drifted is None else self.drifted / self.tokens

    @property
    def variance(self) -> Float[Tensor, " d"]:
        return (self.outer.diagonal() / self.tokens - self.mean.square()).clamp_min(0)

    @property
    def influence(self) -> float | None:
        """1 - E cos(x, x + f(x))."""
        return None if self.turned is None else self.turned / self.tokens

    @property
    def absolute(self) -> Float[Tensor, " d"] | None:
        """Root mean square over windows of the mean |x̂| over tokens."""
        return None if self.loudness is None else (self.loudness / self.windows).sqrt()

    @property
    def relative(self) -> Float[Tensor, " d"] | None:
        """E[x̂² / ‖y‖²]."""
        return None if self.related is None else self.related / self.tokens

    def fed_power(self, feeder: str) -> Float[Tensor, " d_fed"] | None:
        """E[x̂²] of what a feeder receives."""
        return self.fed[feeder] / self.tokens if feeder in self.fed else None

    @property
    def energy(self) -> float | None:
        """E‖y‖²."""
        return None if self.crossed is None else self.power / self.tokens


def _with_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """The total and leftᵀ right; the first product is the total."""
    product = multiplied(left, right)
    return product.double() if total is None else _added(total, product)


def _added(total: Tensor, product: Tensor) -> Tensor:
    """The same as total += product, which would make all of it wide first."""
    rows = max(1, VALUES_AT_ONCE // product.shape[1])
    for some, other in zip(total.split(rows), product.split(rows), strict=True):
        some.add_(other)
    return total


def strips(width: int) -> Iterator[slice]:
    """Rows of a symmetric matrix, some at a time."""
    height = -(-width // STRIPS)
    yield from (slice(start, min(start + height, width)) for start in range(0, width, height))


def multiplied(left: Float[Tensor, "tokens m"], right: Float[Tensor, "tokens n"]) -> Float[Tensor, "m n"]:
    """leftᵀ right in float32 or better.

    Half floats go as they are into matrix units that add up in float32: a product of two of them is exact there, so
    nothing is lost that float32 would keep, and it is made at many times the speed.
    """
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return precise(left).T @ precise(right)


def precise(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def moments_bytes(
    d_in: int,
    d_out: int,
    needs: Iterable[str] = (),
    *,
    part: bool = True,
    paired: bool = False,
    fed: Sequence[int] = (),
) -> int:
    """Of `Moments` of one site in float64: means, second moments, and what `needs` adds.

    `part`: its output is that of a sub-layer. `paired`: its input is paired with the dense model's. `fed`: widths of
    the inputs of its feeders.
    """
    needs, values = set(needs), d_in + d_in**2
    if {"cross", "drift"} & needs:
        values += d_out * d_in * (2 if part else 1) + (d_in**2 if paired else 0)
    values += d_in * len({"absolute", "relative"} & needs) + (sum(fed) if "power" in needs else 0)
    return 8 * values


def moments_flops(
    tokens: int, d_in: int, d_out: int, needs: Iterable[str] = (), *, part: bool = True, paired: bool = False
) -> int:
    """Of adding up the moments of one site."""
    own = sum((strip.stop - strip.start) * strip.stop for strip in strips(d_in))
    if {"cross", "drift"} & set(needs):
        own += d_in**2 if paired else d_in * d_out
        own += d_in * d_out if part else 0
    return 2 * tokens * own
