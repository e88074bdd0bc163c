"""ELSA: all weights learn on the model's true loss, and ADMM pulls them towards sparse ones that they become."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prunekit import Finisher, Workpiece, best_weights, check_choices
from prunekit.layer.candidates import Per
from prunekit.models.blocks import chunks
from prunekit_strategies.finishers.training import CLIP, LanguageLoss, held_out, holding_zeros

Schedule = Literal["constant", "linear", "cosine", "exponential"]
Start = Literal["dense", "pruned"]

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8  # of Adam
FIRST = 0.01  # λ in the first step, as a share of what it rises to
NAME, SAVES = "elsa", 10  # of what is saved, and how often in a run
LARGEST, SMALLEST = 448.0, 2.0**-9  # FP8 E4M3 holds no larger number, and no smaller one but zero


@dataclass(frozen=True)
class Elsa(Finisher):
    """Train the model on its next-token loss, with every linear map pulled towards a sparse one.

    Of a map, x (d_out, d_in) learns, z has k d_out non-zeros, k as the allocator said, or n of every m, and u adds up
    what keeps them apart. z and x begin as the pruner left them, or x dense and z as its largest weights (`start`), and
    u = 0. With f the mean loss per token of the calibration text:

        learn      x ← Adam(x, g),   x ← x - λ (x - z + u),   g = ∇f, all of it of norm 1 at most      (1)
        or         x ← Adam(x, g + λ (x - z + u))                         with `coupled`               (1')
        project    z ← x + u where F (x + u)² is largest, 0 elsewhere                                  (2)
        dual       u ← x + u - z                                                                       (3)
        penalty    u ← u λ / λ', λ ← λ'                                                                (4)

    (1) every step, (2)-(4) every `interval` steps. F is Adam's second moment, nearly the diagonal of the empirical
    Fisher matrix, so that (2) gives up what the loss misses least; without `aware` it is 1. On a fixed support f is
    least in the limit, whatever λ, and with (1') λu is -∇f on what was removed; (4) keeps it.

    In the end x is projected by (2), u = 0. For the last `settle` of the steps it then learns on with its zeros held:
    a long run ends with x = z, a short one does not, and what the projection takes has to be made up for.

    Source: ELSA (arXiv 2510.01650) and its released code: (1') unless told, `start: dense`, F of 1 unless told, in
    4096 steps of 8 windows of 2048 tokens, 32 between projections, `settle: 0`. Ours: (1), the start and the end, for
    few steps; F in (2) of single tensors with an exact count, on a tie the lower column stays; (4) as soon as λ
    changes; f with the divergence from the dense model if asked (`teacher`).

    Memory: 20 bytes a weight of a linear map (x, z, u and Adam's two moments), 12 of others, gradients and
    activations of `micro_tokens` tokens. What it reports is measured on windows that were held out; nothing ends it
    early. A step whose gradient is no number is left out. It saves its state ten times and goes on from there.
    """

    structures = frozenset({"weights", "n:m"})
    trains = True

    steps: int = 256
    batch_tokens: int = 2048  # per step; whole windows, at least one
    micro_tokens: int = 2048  # at once, of these
    rate: float = 2e-3  # of Adam at the first step, then in a line to 0; for small models, larger ones bear less
    penalty: float = 0.01  # λ, in the end; with `coupled` it competes with gradients, else it is a share of the way
    schedule: Schedule = "constant"  # or how λ rises, from a hundredth
    interval: int = 8  # steps between two projections
    settle: float = 0.5  # share of the steps, the last ones, on a fixed support
    start: Start = "pruned"  # where x and z begin; dense is the paper's, and wants many steps
    aware: bool = True  # of the objective: F in (2)
    coupled: bool = False  # (1') instead of (1), as the released code unless told otherwise
    per: Per = "layer"  # rows keep as many as (2) says, or k each
    others: bool = True  # embeddings, norms and biases learn too
    teacher: float = 0.0  # weight of the divergence from the dense model
    held_out: float = 0.125  # share of the windows, the last ones
    quantised: bool = False  # z and Adam's moments of linear maps in FP8, u in bfloat16

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.steps, self.batch_tokens, self.micro_tokens, self.interval) < 1:
            raise ValueError(
                "steps, batch_tokens, micro_tokens and interval are 1 at least, not "
                f"{self.steps}, {self.batch_tokens}, {self.micro_tokens} and {self.interval}"
            )
        if not (self.rate > 0 and self.penalty >= 0 and self.teacher >= 0):
            raise ValueError(
                f"rate > 0, penalty ≥ 0 and teacher ≥ 0 are needed, not {self.rate}, {self.penalty} and {self.teacher}"
            )
        if not (0 <= self.settle < 1 and 0 < self.held_out < 1):
            raise ValueError(f"0 ≤ settle < 1 and 0 < held_out < 1 are needed, not {self.settle} and {self.held_out}")

    def finish(self, piece: Workpiece) -> dict[str, Any]:
        train, judge = held_out(piece.tokens, self.held_out)
        loss, judged = LanguageLoss(piece.model, piece.dense, 1.0, self.teacher), list(chunks(judge, self.micro_tokens))
        before = loss.mean(judged)
        run = _Run(self, piece, loss, train.ids)
        with piece.progress.stage("elsa", self.steps) as stage:
            stage.advance(run.done)
            while run.done < self.fixed:
                stage.advance(note=run.learn(self.penalty * self.height(run.done)))  # (1)
                if run.done % self.interval == 0 and run.done < self.fixed:
                    run.project(self.height(run.done - 1) / self.height(run.done))  # (2)-(4)
                run.save()
            if math.isnan(run.gap):
                run.harden()
            with holding_zeros(piece):
                while run.done < self.steps:
                    stage.advance(note=run.learn(0.0))
                    run.save()
        run.close()
        return {
            "held_out_loss": [before, loss.mean(judged)],
            "gap": run.gap,  # ‖x - z‖ / ‖x‖ of all maps together, before the projection that ends it
            "steps": self.steps - run.skipped,
            "tokens": self.steps * self.windows(train.ids.shape[1]) * train.ids.shape[1],
        }

    @property
    def fixed(self) -> int:
        """The step from which on supports stay as they are."""
        return max(1, self.steps - round(self.settle * self.steps))

    def height(self, step: int) -> float:
        """λ in a step, as a share of what it is in the end; it changes with the projections."""
        share = step // self.interval * self.interval / self.fixed
        if self.schedule == "exponential":
            return FIRST ** (1 - share)
        risen = {"constant": 1.0, "linear": share, "cosine": 0.5 - 0.5 * math.cos(math.pi * share)}[self.schedule]
        return FIRST + (1 - FIRST) * risen

    def windows(self, length: int) -> int:
        """Per step."""
        return max(1, self.batch_tokens // length)


@dataclass(frozen=True)
class ElsaL(Elsa):
    """ELSA with small states: z and Adam's moments in FP8 E4M3, u in bfloat16; 9 bytes a parameter instead of 20.

    z has one scale, so a relative error of 2⁻⁴ at most but for its smallest weights, and zeros stay zero; only the
    pull of (1) sees it rounded, (3) does not, or x would be drawn to numbers of FP8. Moments have one scale per row
    and are rounded up or down by chance, in proportion: √v moves by less than half a unit in a step, and would never
    fall. √v is what is stored, and read as no less than the smallest number of its row, since it divides.

    Source: ELSA-L of the same paper (arXiv 2510.01650), which takes 8-bit Adam from elsewhere; moments are ours.
    """

    quantised: bool = True


class Weights:
    """One parameter x, and what Adam knows of it."""

    def __init__(self, x: Tensor, quantised: bool = False) -> None:
        self.x, self.quantised, self.kept = x, quantised, dict[str, Tensor]()
        for name in ("m", "v"):
            self.put(name, torch.zeros_like(x))

    @torch.no_grad()
    def step(self, rate: float, step: int, penalty: float, dice: torch.Generator) -> None:
        """Adam's, number `step` from 1, down the gradient of x."""
        gradient = self.x.grad
        assert gradient is not None
        m = self.get("m").lerp_(gradient, 1 - BETA1)
        v = self.get("v").mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        root = (v / (1 - BETA2**step)).sqrt_().add_(EPSILON)
        self.x.addcdiv_(m, root, value=-rate / (1 - BETA1**step))
        self.put("m", m, dice)
        self.put("v", v, dice)

    def get(self, name: str) -> Tensor:
        """m, v, z or u, in the dtype of x."""
        stored = self.kept[name]
        if stored.dtype == torch.float8_e4m3fn:
            scale = self.kept[f"{name}.scale"]
            value = stored.to(self.x.dtype) * scale
            return value.clamp_(min=SMALLEST * scale).square_() if name == "v" else value
        return stored.to(self.x.dtype)

    def put(self, name: str, value: Tensor, dice: torch.Generator | None = None) -> None:
        """Store m, v, z or u; with dice, numbers that are not exact are rounded up or down by chance."""
        if not self.quantised:
            self.kept[name] = value
        elif name == "u":
            self.kept[name] = value.bfloat16()
        else:
            value = value.sqrt() if name == "v" else value
            self.kept[name], self.kept[f"{name}.scale"] = rounded(value, rows=name != "z", dice=dice)


class Map(Weights):
    """The weight of a linear map: x learns, z has the zeros that x shall have, u adds up x - z."""

    def __init__(self, x: Tensor, z: Tensor, keep: int, block: int, options: Elsa) -> None:
        super().__init__(x, options.quantised)
        self.keep, self.block, self.options = keep, block, options
        self.put("z", z)
        self.put("u", torch.zeros_like(z))

    @torch.no_grad()
    def step(self, rate: float, step: int, penalty: float, dice: torch.Generator) -> None:
        """(1) or (1'), number `step` from 1."""
        if penalty and self.options.coupled:
            assert self.x.grad is not None
            self.x.grad.add_(self._apart(), alpha=penalty)
        super().step(rate, step, penalty, dice)
        if penalty and not self.options.coupled:
            self.x.sub_(self._apart(), alpha=penalty)

    @torch.no_grad()
    def project(self, ratio: float) -> None:
        """(2)-(4), for a penalty that is `ratio` times the one to come."""
        whole = self.x + self.get("u")
        z = torch.where(self.best(whole), whole, 0)  # (2)
        self.put("z", z)
        self.put("u", (whole - z) * ratio)  # (3), (4)

    @torch.no_grad()
    def harden(self) -> tuple[float, float]:
        """x is projected, z and u are forgotten; Σ of squares of what x has lost, and of what it had."""
        stays = self.best(self.x)
        had, lost = (float(part.square().sum(dtype=torch.float64)) for part in (self.x, self.x[~stays]))
        self.x.mul_(stays)
        m, v = self.get("m") * stays, self.get("v")
        self.kept.clear()
        self.put("m", m)
        self.put("v", v)
        return lost, had

    def best(self, weight: Tensor) -> Bool[Tensor, "d_out d_in"]:
        """Where F w² is largest: as many as may stay."""
        score = weight.abs() * self.get("v").sqrt() if self.options.aware else weight.abs()
        return best_weights(score, [self.keep], self.options.per, self.block)[0]

    def _apart(self) -> Tensor:
        return self.x - self.get("z") + self.get("u")


class _Run:
    """All that the next step depends on."""

    def __init__(self, options: Elsa, piece: Workpiece, loss: LanguageLoss, ids: Tensor) -> None:
        self.options, self.loss, self.ids = options, loss, ids
        self.seed, self.checkpoints = piece.seed, piece.checkpoints
        self.maps = _maps(options, piece)
        mine = {id(part.x) for part in self.maps}
        others = [p for p in piece.model.parameters() if id(p) not in mine] if options.others else []
        self.parts: list[Weights] = [*self.maps, *map(Weights, others)]
        self.done, self.skipped, self.gap = 0, 0, math.nan
        if (tensors := self.checkpoints.load(NAME)) is not None:
            self._load(tensors)
        for part in self.parts:
            part.x.requires_grad_(True)

    def learn(self, penalty: float) -> str:
        """One step; what it has to say."""
        value, xs = 0.0, [part.x for part in self.parts]
        ids = self.ids[self._drawn()]
        for some in ids.split(max(1, self.options.micro_tokens // ids.shape[1])):
            part = self.loss(some) * (len(some) / len(ids))
            part.backward(inputs=xs)
            value += part.item()
        number = bool(torch.isfinite(nn.utils.clip_grad_norm_(xs, CLIP)))
        dice = torch.Generator().manual_seed(self.seed * 1_000_003 + self.done)
        rate = self.options.rate * (1 - self.done / self.options.steps)
        self.done += 1
        self.skipped += not number
        for weights in self.parts:
            if number:
                weights.step(rate, self.done, penalty, dice)
            weights.x.grad = None
        return f"loss {value:.4g}"

    def project(self, ratio: float) -> None:
        for part in self.maps:
            part.project(ratio)

    def harden(self) -> None:
        sums = [part.harden() for part in self.maps]
        lost, had = (sum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
        self.gap = math.sqrt(lost / had) if had else 0.0

    def save(self) -> None:
        """Ten times a run."""
        if self.done % max(1, self.options.steps // SAVES) == 0 and self.done < self.options.steps:
            self._save({f"{i}.{key}": value for i, part in enumerate(self.parts) for key, value in part.kept.items()})

    def close(self) -> None:
        """What has been learnt is all that is remembered."""
        for part in self.parts:
            part.x.requires_grad_(False)
            part.kept.clear()
        self._save({})

    def _save(self, kept: Mapping[str, Tensor]) -> None:
        standing = torch.tensor([self.done, self.skipped, self.gap], dtype=torch.float64)
        weights = {f"{i}.x": part.x for i, part in enumerate(self.parts)}
        self.checkpoints.save(NAME, {"standing": standing, **weights, **kept})

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        done, skipped, self.gap = tensors["standing"].tolist()
        self.done, self.skipped = int(done), int(skipped)
        for i, part in enumerate(self.parts):
            names = {name.partition(".")[2]: name for name in tensors if name.startswith(f"{i}.")}
            part.x.data.copy_(tensors[names.pop("x")])
            part.kept = {key: tensors[name].to(part.x.device) for key, name in names.items()}

    def _drawn(self) -> Tensor:
        """Windows of the next step: every epoch meets all of them, in an order of its own."""
        n, per = len(self.ids), self.options.windows(self.ids.shape[1])
        places = range(self.done * per, (self.done + 1) * per)
        order = {
            epoch: torch.randperm(n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            for epoch in {place // n for place in places}
        }
        return torch.stack([order[place // n][place % n] for place in places])


@torch.no_grad()
def _maps(options: Elsa, piece: Workpiece) -> list[Map]:
    """The weights of all sites: x and z where they begin."""
    small, dense = (piece.adapter.blocks(model) for model in (piece.model, piece.dense))
    maps = []
    for site, keep in zip(piece.sites, piece.plan, strict=True):
        if not site.form.shrinks:
            x = piece.adapter.linear(small[site.block], site).weight
            z = x.detach().clone()
            if options.start == "dense":
                x.copy_(piece.adapter.linear(dense[site.block], site).weight)
                z = torch.where(best_weights(x.abs(), [keep], options.per, site.form.m)[0], x, 0)
            maps.append(Map(x, z, keep, site.form.m, options))
    return maps


def rounded(
    value: Float[Tensor, "d_out d_in"], *, rows: bool = False, dice: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """FP8 E4M3 numbers and what to multiply them with, per row or in one: (d_out, d_in) and (d_out, 1) or (1, 1).

    To the nearest number, by 2⁻⁴ of it at most above 2⁻⁶ scales; with dice to one of the two beside it, in mean exact.
    """
    largest = value.abs().amax(dim=1 if rows else (0, 1), keepdim=True)
    scale = (1.05 / LARGEST * largest).clamp_(min=torch.finfo(value.dtype).tiny)
    value = value / scale
    if dice is not None:
        unit = torch.exp2(value.abs().clamp(min=2.0**-6).log2().floor() - 3)  # between two numbers of FP8
        value = value + unit * (torch.rand(value.shape, generator=dice).to(value) - 0.5)
    return value.to(torch.float8_e4m3fn), scale
