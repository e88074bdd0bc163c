"""SparseLLM: the maps of an MLP are pruned for each other, through hidden activations that are free to move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunekit import Finisher, LayerProblem, LocalPruner, Site, Workpiece, WrongInput, check_choices, solved
from prunekit.calibration.twin import Aim, SubLayer, Twin, whole_parts
from prunekit.models.adapters.transformer import Transformer
from prunekit.plugins.adapter import ModelAdapter
from prunekit_strategies.pruners.compensation import SINGLE
from prunekit_strategies.pruners.sparsegpt import SparseGPT

AT_ONCE = 1 << 22  # activations whose derivatives are taken together
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SparseLLM(Finisher):
    """Prune the linear maps of every MLP anew, in turns with the activations between them.

    Of one MLP, x (d) what it receives behind pruned layers, y (d) what it should give (`aim`, as in `least-squares`),
    over tokens, biases in their places:

        plain    α ‖z - W₁ x‖² + γ ‖p - φ(z)‖² + β ‖y - W₂ p‖²                                          (1)
        gated    α ‖z - W_u x‖² + α ‖s - W_g x‖² + γ ‖p - φ(s) ∘ z‖² + β ‖y - W_d p‖²                   (2)

    z, s and p start as the dense maps' on x. A round takes in turn what minimises (1) or (2) while the rest stays:

        p    h + W₂ᵀ (W₂ W₂ᵀ + γ/β I)⁻¹ (y - W₂ h),      h = φ(z) or φ(s) ∘ z                           (3)
        z    gated: (α W_u x + γ σ p) / (α + γ σ²),      σ = φ(s), per element                          (4)
             plain, ReLU: the better of max((γ p + α m) / (γ + α), 0) and min(m, 0),  m = W₁ x          (5)
        s, and z for other φ: per element, Newton downhill on α (s - m)² + γ (p - c φ(s))²              (6)
        W    W + E[(z - W x) xᵀ] (E[x xᵀ] + λI)⁻¹, so s and W_g; y, p and W₂; then `pruner` prunes it
             to the count it had, on E[x xᵀ] or E[p pᵀ]                                                 (7)

    The MLP takes the weights, of the start or behind a round, with which it really gives the least error on these
    tokens: none is worse than it was.

    Source: Bai et al. 2024, SparseLLM (arXiv 2402.17946), with the corrections that make every update exact: its
    gated z is ours for α = γ alone, its pseudo-inverse loses what no token reaches, and its last z and s are never
    used. Attention stays as the recipe's pruner made it. Ours: inputs behind pruned attention, the ridge of (7) towards
    present weights, activations other than ReLU and SiLU, and the choice in the end. Without pruning the sums fall
    with every update; the pruner's step may raise them. Only ratios of α, β and γ matter.

    Memory: 3 d_ff `tokens`, gated 4, in the dtype of the small model. Costs a round d_ff² `tokens` and the pruner.
    """

    structures = SINGLE

    pruner: LocalPruner = field(default_factory=SparseGPT)  # of single weights, reading no more than the gram
    aim: Aim = "dense"
    rounds: int = 4
    alpha: float = 1.0  # of activations before φ
    beta: float = 1.0  # of the output
    gamma: float = 1.0  # of activations behind φ
    newton: int = 8  # steps of (6)
    damping: float = 0.01  # λ, as a share of the mean of the diagonal
    tokens: int = 16_384  # of calibration, the first so many

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.rounds, self.newton, self.tokens) < 1 or not self.damping >= 0:
            raise ValueError("rounds, newton and tokens are at least 1, damping is 0 or more")
        if not min(self.alpha, self.beta, self.gamma) > 0:
            raise ValueError(f"alpha, beta, gamma > 0, not {self.alpha}, {self.beta}, {self.gamma}")
        if not self.pruner.structures >= SINGLE or not self.pruner.needs <= {"gram"}:
            raise ValueError(f"pruner: {type(self.pruner).__name__} prunes no single weights by the gram alone")

    def check(self, adapter: ModelAdapter) -> None:
        if not isinstance(adapter, Transformer):
            raise WrongInput("sparsellm works on the MLPs of a model, and this family has none; take least-squares")
        front = [adapter.family.units(path) for path in adapter.family.producers("mlp")]
        if any(len(units) > 1 for units in front):
            raise WrongInput("sparsellm works on MLPs whose gate and up are maps of their own; take least-squares")

    @torch.no_grad()
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        errors, changed = dict[str, Any](), 0
        twin = Twin(whole_parts(piece), piece.tokens.first(self.tokens))
        with piece.progress.stage("sparsellm", len(twin)) as stage:
            for here in twin:
                if here.site.kind == "mlp":
                    before, after = self._alternated(MLP.of(here, piece), here)
                    errors[here.site.name] = [before, after]
                    changed += after < before
                stage.advance(note=here.site.name)
        return {"changed": changed, "of": len(errors), "errors": errors}

    def _alternated(self, mlp: MLP, here: SubLayer) -> tuple[float, float]:
        """The rounds on one MLP, in place; its relative output errors before and after."""
        x = torch.cat([here.entering(i).flatten(0, -2) for i in range(len(here))])
        y = torch.cat([here.wanted(i, self.aim).flatten(0, -2) for i in range(len(here))])
        mlp.check(x, torch.cat([here.inputs(i).flatten(0, -2) for i in range(len(here))]))
        pre = [
            linear(x.to(linear.weight.dtype)).to(x)
            for linear in here.twin.piece.adapter.maps(here.dense_block, here.site)[:-1]
        ]
        power = float(y.square().sum(dtype=torch.float64)) or 1.0
        least = before = mlp.error(x, y) / power
        found = [linear.weight.clone() for linear in mlp.maps]
        for _ in range(self.rounds):
            p = hidden(mlp.down, y, mlp.merged(pre), self.beta / self.gamma)  # (3)
            pre = self._before(mlp, x, p, pre)
            for linear, wanted in zip(mlp.front, pre, strict=True):
                self._fit(mlp, linear, x, wanted)
            self._fit(mlp, mlp.down, p, y)
            if (error := mlp.error(x, y) / power) < least:
                least, found = error, [linear.weight.clone() for linear in mlp.maps]
        for linear, weight in zip(mlp.maps, found, strict=True):
            linear.weight.copy_(weight)
        return before, least

    def _before(self, mlp: MLP, x: Tensor, p: Tensor, pre: list[Tensor]) -> list[Tensor]:
        """What the maps in front should give: (4), (5), (6)."""
        made, ratio = [linear(x) for linear in mlp.front], self.gamma / self.alpha
        if len(pre) == 1 and isinstance(mlp.phi, nn.ReLU):
            return [rectified(made[0], p, ratio)]
        if len(pre) == 1:
            return [downhill(made[0], p, torch.ones_like(p), pre[0], mlp.phi, ratio, self.newton)]
        z = gated(made[1], p, mlp.phi(pre[0]), ratio)
        return [downhill(made[0], p, z, pre[0], mlp.phi, ratio, self.newton), z]

    def _fit(self, mlp: MLP, linear: nn.Linear, x: Tensor, wanted: Tensor) -> None:
        """(7), in place."""
        site, keep = mlp.counts[linear]
        gram = (x.T @ x).double() / len(x)
        layer = LayerProblem(linear.weight, gram, form=site.form, damping=self.damping, name=site.name)
        missed = ((wanted - linear(x)).T @ x).double() / len(x)
        weight = linear.weight + solved(layer.hessian, missed.T).T
        (candidate,) = self.pruner.prune(replace(layer, weight=weight), [keep])
        linear.weight.copy_(candidate.weight)


@dataclass(frozen=True, eq=False)
class MLP:
    """The linear maps of one MLP, with what their sites keep."""

    front: list[nn.Linear]  # gate and up, or the only one
    down: nn.Linear
    phi: nn.Module
    counts: Mapping[nn.Linear, tuple[Site, int]]

    @classmethod
    def of(cls, here: SubLayer, piece: Workpiece) -> MLP:
        """That of a sub-layer of the small model.

        Raises:
            WrongInput: it is no MLP with one activation.
        """
        adapter, (*front, down) = piece.adapter, here.maps
        pairs = [
            (site, keep) for site, keep in zip(piece.sites, piece.plan, strict=True) if site.block == here.site.block
        ]
        counts = {adapter.linear(here.block, site): (site, keep) for site, keep in pairs}
        known = ("torch.nn.modules.activation", "transformers.activations")
        within = here.block.get_submodule(adapter.holder(here.site) or "")
        found = [module for module in within.modules() if type(module).__module__ in known]
        if len(found) != 1 or len(front) > 2:
            raise WrongInput(
                f"sparsellm knows MLPs of two or three maps and one activation; {here.site.name} is of none"
            )
        return cls(front, down, found[0], counts)

    @property
    def maps(self) -> list[nn.Linear]:
        return [*self.front, self.down]

    def merged(self, pre: list[Tensor]) -> Float[Tensor, "tokens d_ff"]:
        """φ(z), or φ(s) ∘ z."""
        return self.phi(pre[0]) if len(pre) == 1 else self.phi(pre[0]) * pre[1]

    def error(self, x: Tensor, y: Tensor) -> float:
        """Σ ‖y - f(x)‖² with the weights of now."""
        made = self.down(self.merged([linear(x) for linear in self.front]))
        return float((y - made).square().sum(dtype=torch.float64))

    def check(self, x: Tensor, inside: Tensor) -> None:
        """Refuse an MLP that makes something else of x before its last map.

        Raises:
            WrongInput: it does.
        """
        apart = float((self.merged([linear(x) for linear in self.front]) - inside).abs().max())
        if apart > 1e-2 * (float(inside.abs().max()) + 1e-9):
            raise WrongInput(
                "sparsellm knows MLPs that are φ(W₁ x) or φ(W_g x) ∘ W_u x before the last map; this is not"
            )


def hidden(
    down: nn.Linear, y: Float[Tensor, "tokens d"], h: Float[Tensor, "tokens d_ff"], ratio: float
) -> Float[Tensor, "tokens d_ff"]:
    """(3): argmin over p of ratio ‖y - W₂ p - b‖² + ‖p - h‖²; a solve of (d, d), by the push-through identity."""
    w = down.weight.double()
    gram = w @ w.T
    gram.diagonal().add_(1 / ratio)
    gain = solved(gram, w).to(h)  # (d, d_ff)
    return h + (y - down(h)) @ gain


def gated(m: Tensor, p: Tensor, sigma: Tensor, ratio: float) -> Tensor:
    """(4): argmin over z of (z - m)² + ratio (p - σ z)²."""
    return (m + ratio * sigma * p) / (1 + ratio * sigma.square())


def rectified(m: Tensor, p: Tensor, ratio: float) -> Tensor:
    """(5): argmin over z of (z - m)² + ratio (p - max(z, 0))², the lowest of all."""

    def loss(z: Tensor) -> Tensor:
        return (z - m).square() + ratio * (p - z.clamp_min(0)).square()

    above, below = ((ratio * p + m) / (ratio + 1)).clamp_min(0), m.clamp_max(0)
    return torch.where(loss(above) <= loss(below), above, below)


def downhill(m: Tensor, p: Tensor, c: Tensor, start: Tensor, phi: Activation, ratio: float, steps: int) -> Tensor:
    """(6): of every element towards a minimum over s of (s - m)² + ratio (p - c φ(s))², from the better of m and start.

    Newton's step, or Gauss and Newton's where the curve is not convex enough; halved twice whenever it leads up.
    """
    many = max(1, AT_ONCE // m.shape[1])
    parts = zip(*(tensor.split(many) for tensor in (m, p, c, start)), strict=True)
    return torch.cat([_downhill(a, b, d, e, phi, ratio, steps) for a, b, d, e in parts])


def _downhill(m: Tensor, p: Tensor, c: Tensor, start: Tensor, phi: Activation, ratio: float, steps: int) -> Tensor:
    def loss(s: Tensor) -> Tensor:
        return (s - m).square() + ratio * (p - c * phi(s)).square()

    s = torch.where(loss(m) < loss(start), m, start)
    least, length = loss(s), torch.ones_like(s)
    for _ in range(steps):
        value, first, second = derivatives(phi, s)
        missed = p - c * value
        slope = (s - m) - ratio * c * first * missed
        safe = 1 + ratio * (c * first).square()
        curve = safe - ratio * c * second * missed
        there = s - length * slope / torch.where(curve > 0.1 * safe, curve, safe)
        now = loss(there)
        better = now < least
        s, least = torch.where(better, there, s), torch.where(better, now, least)
        length = torch.where(better, (2 * length).clamp_max(1), length / 4)
    return s


def derivatives(phi: Activation, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ, φ′ and φ″ at every element."""
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        value = phi(s)
        (first,) = torch.autograd.grad(value.sum(), s, create_graph=True)
        second = torch.zeros_like(s)
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), s, materialize_grads=True, allow_unused=True)
    return value.detach(), first.detach(), second
