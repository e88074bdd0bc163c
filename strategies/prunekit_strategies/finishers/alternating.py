"""The maps of every MLP refitted in turn: the last exactly, those in front as far as the output is linear in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from prunekit import Finisher, LayerProblem, ModelAdapter, Workpiece, WrongInput, check_choices, solved
from prunekit.calibration.twin import Aim, SubLayer, Twin

SAME = 1e-4  # relative difference below which an output is linear in a weight, in float32
NEAR = 1e-3  # length of the step that tells how f turns along a slope, over that of the weight
HALVINGS = 12  # of a gradient step that would raise the error


@dataclass(frozen=True)
class Alternating(Finisher):
    """Refit gate, up and down of every MLP in turn to what it should give, each while the others are held.

    With x the inputs of a pruned MLP f = W_d (φ(W_g x) ∘ W_u x), and y what should come out (`aim`, as in
    `least-squares`), minimise Σ ‖y - f(x)‖² over tokens by turns:

        down    W_d ← W_d + R (H + λI)⁻¹,   R = E[(y - f) hᵀ],   H = E[h hᵀ],   h what W_d receives         (1)
        up      conjugate gradients on the normal equations Jᵀ J Δ = Jᵀ (y - f), f linear in W_u            (2)
        gate    W_g ← W_g - η ∂/∂W_g,   η halved until the error falls                                     (3)

    (1) is the exact minimum but for λ, which draws to the present weights; every step of (2) lowers the error, and so
    does (3), which is left out where none does. So on these tokens no step raises it. Products with J and Jᵀ are
    derivatives of the MLP as it stands: nothing of d_ff · d is ever solved, and which maps are like W_u, and which like
    W_g, is read off f(2 W) - f(W) = f(W) - f(0). An MLP without gate has (1) and (3); a fused gate and up has (3).

    Source: SPAP (arXiv 2505.03373), recovery by alternating over the parts of the MLP. Derived: (1) to (3), for we did
    not find its updates; attention stays as it is.

    Costs for every MLP and round one pass for (1), two for each step of (2), and two or more for each of (3), through
    the MLP alone, on the first `tokens` tokens. Deterministic, so nothing is kept for a resumed run.
    """

    rounds: int = 4
    conjugate: int = 8  # steps of (2) in a round
    descent: int = 4  # steps of (3) in a round
    aim: Aim = "stream"
    damping: float = 0.01  # λ of (1), as a share of the mean of diag H
    tokens: int = 16_384  # of calibration, the first so many

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.rounds, self.tokens) < 1 or min(self.conjugate, self.descent) < 0 or not self.damping >= 0:
            raise ValueError("rounds and tokens are at least 1, conjugate, descent and damping 0 or more")

    def check(self, adapter: ModelAdapter) -> None:
        if not adapter.patches:
            raise WrongInput(
                f"finisher alternating works on MLPs that are one module, which {type(adapter).__name__} has not; take "
                "least-squares or reconstruction"
            )

    @torch.no_grad()
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        self.check(piece.adapter)
        errors = dict[str, Any]()
        twin = Twin(piece, piece.tokens.first(self.tokens))
        with piece.progress.stage("alternating", len(twin)) as stage:
            for here in twin:
                if here.site.kind == "mlp":
                    errors[here.site.name] = self.refit(MLP.of(here, self.aim))
                stage.advance(note=here.site.name)
        return {"errors": errors}

    def refit(self, mlp: MLP) -> list[float]:
        """The rounds on one MLP, in place; its relative errors, before and after every round."""
        power = _power(mlp.wanted) or 1.0
        kinds = {name: mlp.linear_in(name) for name in mlp.front}
        found = [mlp.error() / power]
        for _ in range(self.rounds):
            mlp.solve_last(self.damping)  # (1)
            for name, linear in kinds.items():
                if linear:
                    mlp.conjugate(name, self.conjugate)  # (2)
                else:
                    mlp.descend(name, self.descent)  # (3)
            found.append(mlp.error() / power)
        return found


@dataclass(eq=False)
class MLP:
    """One MLP of the small model as a function of its weights, on tokens that come chunk by chunk."""

    module: nn.Module
    front: Sequence[str]  # paths in the module of the maps in front
    last: str
    inputs: Sequence[Float[Tensor, "_ d"]]
    wanted: Sequence[Float[Tensor, "_ d_out"]]

    @classmethod
    def of(cls, here: SubLayer, aim: Aim) -> MLP:
        """That of a sub-layer."""
        holder = here.twin.piece.adapter.holder(here.site)
        module = here.block.get_submodule(holder or "")
        paths = {id(map_): path for path, map_ in module.named_modules()}
        *front, last = (paths[id(map_)] for map_ in here.maps)
        pairs = [(here.entering(i).flatten(0, -2), here.wanted(i, aim).flatten(0, -2)) for i in range(len(here))]
        return cls(module, front, last, *(list(side) for side in zip(*pairs, strict=True)))

    def map(self, name: str) -> nn.Linear:
        """One of its maps."""
        found = self.module.get_submodule(name)
        assert isinstance(found, nn.Linear)
        return found

    def made(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """f(x), with other weights for some of the maps."""
        other = {f"{name}.weight": weight for name, weight in (weights or {}).items()}
        return functional_call(self.module, other, (x,))

    def error(self) -> float:
        """Σ ‖y - f(x)‖²."""
        return _power([y - self.made(x) for x, y in zip(self.inputs, self.wanted, strict=True)])

    def linear_in(self, name: str) -> bool:
        """Whether f is linear in a weight, but for a constant."""
        x, weight = self.inputs[0], self.map(name).weight
        none, once, twice = (self.made(x, {name: k * weight}) for k in (0, 1, 2))
        return float((twice - 2 * once + none).norm()) <= SAME * float((once - none).norm())

    def solve_last(self, damping: float) -> None:
        """(1), in place."""
        linear, sums = self.map(self.last), list[Tensor]()
        caught = list[Tensor]()
        handle = linear.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        try:
            for x, y in zip(self.inputs, self.wanted, strict=True):
                missing, h = y - self.made(x), caught.pop()
                more = (h.T @ h).double(), (missing.T @ h).double()
                sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else list(more)
        finally:
            handle.remove()
        tokens = sum(map(len, self.inputs))
        problem = LayerProblem(linear.weight, sums[0] / tokens, damping=damping, name=self.last)
        linear.weight += solved(problem.hessian, sums[1].T / tokens).T.to(linear.weight)

    def conjugate(self, name: str, steps: int) -> None:
        """(2), in place: conjugate gradients for least squares; f is linear in the weight, but for a constant."""
        weight = self.map(name).weight
        missing = [y - self.made(x) for x, y in zip(self.inputs, self.wanted, strict=True)]
        constant = [self.made(x, {name: torch.zeros_like(weight)}) for x in self.inputs]
        slope = self._back(name, missing)
        step, power = slope, float(slope.square().sum())
        for _ in range(steps):
            there = {name: step.to(weight)}
            turned = [self.made(x, there) - none for x, none in zip(self.inputs, constant, strict=True)]  # J step
            length = _power(turned)
            if not (power > 0 and length > 0):
                return
            rate = power / length
            weight += (rate * step).to(weight)
            missing = [r - rate * q for r, q in zip(missing, turned, strict=True)]
            slope, before = self._back(name, missing), power
            power = float(slope.square().sum())
            step = slope + power / before * step

    def descend(self, name: str, steps: int) -> None:
        """(3), in place: the first rate is that of Gauss and Newton along the slope, the best where f is linear."""
        weight = self.map(name).weight
        for _ in range(steps):
            made = [self.made(x) for x in self.inputs]
            missing = [y - f for y, f in zip(self.wanted, made, strict=True)]
            slope, old, least = self._back(name, missing), weight.clone(), _power(missing)
            power = float(slope.square().sum())
            if not power > 0:
                return
            little = NEAR * float(old.norm()) / power**0.5 or NEAR
            there = {name: old + (little * slope).to(old)}
            length = _power([self.made(x, there) - f for x, f in zip(self.inputs, made, strict=True)]) / little**2
            rate = power / length if length > 0 else 1.0
            for halving in range(HALVINGS):
                weight.copy_(old + (0.5**halving * rate * slope).to(old))
                if self.error() < least:
                    break
            else:
                weight.copy_(old)
                return

    def _back(self, name: str, missing: Sequence[Tensor]) -> Tensor:
        """Jᵀ · missing, in float64."""
        weight = self.map(name).weight
        total = torch.zeros_like(weight, dtype=torch.float64)
        for x, r in zip(self.inputs, missing, strict=True):
            with torch.enable_grad():
                here = weight.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.made(x, {name: here}), here, r)
            total += slope
        return total


def _power(parts: Sequence[Tensor]) -> float:
    return sum(float(part.square().sum(dtype=torch.float64)) for part in parts)
