"""A linear map of low rank beside the MLP: what the pruned one no longer does, as far as it is linear in its input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Finisher, ModelAdapter, Site, Workpiece, WrongInput, check_choices, solved
from prunekit.calibration.twin import Aim, SubLayer, Twin, sub_layers

Truncate = Literal["optimal", "released"]
Chunks = Iterable[tuple[Tensor, Tensor, float]]  # inputs x and outputs e, tokens first, and the power of what is wanted

TOKENS = 128 * 128  # at which the ridge is its share of the mean of diag H, as the released code counts
SHARPNESS = 0.05  # of the weights of outputs in the released truncation


@dataclass(frozen=True)
class LinearPatch(Finisher):
    """Put a linear map of rank r beside some MLPs, fitted to what these have lost, block by block.

    With x (d) the input of an MLP in the small model, y (d_out) what should come out (`aim`, as in `least-squares`) and
    e = y - MLP(x), moments over N tokens:

        H = E[x xᵀ] + λI,   R = E[e xᵀ],   λ = damping · 16,384 / N · mean diag E[x xᵀ]                     (1)
        D = R H⁻¹                      the ridge regression of e on x                                       (2)
        P = U_r U_rᵀ D                 U_r: leading eigenvectors of D Rᵀ = R H⁻¹ Rᵀ             optimal     (3)
        P = Ω⁻¹ (Ω D)_r                truncated singular values, Ω = diag σ((ρ - mean ρ) / 0.05)  released  (4)

    with ρ_i the correlation of output i of D x with e_i. (3) is the best of all maps of rank r in the objective of (2):

        E‖e - P x‖² + λ ‖P‖² = E‖e‖² - Σ_{i ≤ r} μ_i,   μ the eigenvalues of R H⁻¹ Rᵀ, largest first          (5)

    because E‖e - P x‖² + λ‖P‖² = E‖e‖² - tr R H⁻¹ Rᵀ + ‖(D - P) H^½‖², and left singular vectors of D H^½ are those
    eigenvectors. So on the calibration tokens no MLP gets worse.

    MLPs with a map are the `layers` of highest mean correlation between y and its own ridge regression on x, in the
    dense model: those that are nearest to linear. The last block never has one, nor have MLPs that have lost nothing.

    Source: Olica (He & Lin 2025, arXiv 2506.08436), linear calibration: (1), (2), the choice of MLPs and, from its
    released code, (4) and the dependence of λ on N, where λ is a quarter of the mean at its 32,768 tokens. Ours: (3),
    `aim` (theirs is `own`), and the price: 2 r d parameters for each map are set aside from the budget before the
    search, where the released code adds them. Where fewer MLPs are left than `layers`, the rest stays unspent.

    The result is of prunekit's classes: `patch` in `per_layer_config` has the rank. It comes last of all finishers.
    Costs two passes through both models, one where all MLPs but the last get a map, and one solve for each.
    """

    structures = frozenset({"groups", "values"})

    layers: int = 6  # MLPs with a map beside them, at most
    rank: float = 0.03  # of each map, as a share of d; at least 1
    damping: float = 0.5  # ridge at 16,384 tokens, as a share of the mean of diag H; less with more
    truncate: Truncate = "optimal"
    aim: Aim = "own"  # the dense MLP on what the small one receives, or as in the dense model, or its residual stream

    def __post_init__(self) -> None:
        check_choices(self)
        if self.layers < 1 or not 0 < self.rank < 0.5 or not self.damping > 0:
            raise ValueError(
                "layers ≥ 1, a rank in 0..0.5 as a share of d and damping > 0 are needed, not "
                f"{self.layers}, {self.rank} and {self.damping}"
            )

    def rank_of(self, d: int) -> int:
        """The rank of a map of d outputs."""
        return max(1, int(self.rank * d))

    def reserved(self, sites: Sequence[Site]) -> int:
        open_ = _open(sites)
        widest = max((site.d_out for site in open_), default=0)  # all are as wide as the residual stream
        return min(self.layers, len(open_)) * 2 * self.rank_of(widest) * widest

    def check(self, adapter: ModelAdapter) -> None:
        if not adapter.patches:
            raise WrongInput(
                f"finisher linear-patch puts a linear map beside MLPs, and {type(adapter).__name__} has no class with "
                "one; take least-squares or reconstruction"
            )

    @torch.no_grad()
    def finish(self, piece: Workpiece) -> dict[str, Any]:
        self.check(piece.adapter)
        piece = sub_layers(piece)
        errors, added = dict[str, Any](), 0
        chosen = self._chosen(piece)
        with piece.progress.stage("linear patch", len(chosen)) as stage:
            for here in Twin(piece, piece.tokens):
                if here.site.name not in chosen:
                    continue
                pairs = Pairs.over(_missing(here, self.aim))
                left, right = pairs.factors(self.damping, self.rank_of(here.site.d_out), self.truncate)
                piece.adapter.add_patch(here.block, here.site, left, right)
                added += left.numel() + right.numel()
                if pairs.asked:
                    lost = float(pairs.power.sum())
                    errors[here.site.name] = [lost / pairs.asked, pairs.error(left @ right) / pairs.asked]
                stage.advance(note=here.site.name)
        return {"parameters_added": added, "errors": errors}

    def _chosen(self, piece: Workpiece) -> set[str]:
        """Names of the sites whose MLPs get a map: of those that have lost something, the nearest to linear."""
        kept = dict(zip((site.name for site in piece.sites), map(len, piece.kept), strict=True))
        lossless = self.aim == "own"  # then an MLP that is whole gives what it should
        there = [site.name for site in _open(piece.sites) if 0 < kept[site.name] < site.n_groups + (not lossless)]
        if len(there) <= self.layers:
            return set(there)
        linear = dict[str, float]()
        with piece.progress.stage("linearity of MLPs", len(there)) as stage:
            for here in Twin(piece, piece.tokens):
                if here.site.name in there:
                    pairs = Pairs.over(_dense(here))
                    linear[here.site.name] = float(pairs.correlations(pairs.ridge(self.damping)).mean())
                    stage.advance(note=here.site.name)
        return set(sorted(there, key=lambda name: -linear[name])[: self.layers])  # of equal ones the first


@dataclass(eq=False)
class Pairs:
    """Means over tokens of the inputs x of a linear map and of what it is to give, e."""

    gram: Float[Tensor, "d d"]  # E[x xᵀ]
    reached: Float[Tensor, "d_out d"]  # R = E[e xᵀ]
    mean: Float[Tensor, " d"]  # E[x]
    centre: Float[Tensor, " d_out"]  # E[e]
    power: Float[Tensor, " d_out"]  # E[e²]
    asked: float  # E‖y‖², of what e is a part of
    tokens: int

    @classmethod
    def over(cls, chunks: Chunks) -> Pairs:
        """Products in the dtype of the chunks, float32 or better, sums in float64."""
        sums, tokens, asked = list[Tensor](), 0, 0.0
        for x, e, power in chunks:
            more = (x.T @ x, e.T @ x, x.sum(0), e.sum(0), e.square().sum(0))
            sums = [a + b.double() for a, b in zip(sums, more, strict=True)] if sums else [m.double() for m in more]
            tokens, asked = tokens + len(x), asked + power
        gram, reached, mean, centre, square = (part / tokens for part in sums)
        return cls(gram, reached, mean, centre, square, asked / tokens, tokens)

    def ridge(self, damping: float) -> Float[Tensor, "d_out d"]:
        """D of (2)."""
        hessian = self.gram.clone()
        hessian.diagonal().add_(damping * TOKENS / self.tokens * self.gram.diagonal().mean())  # (1)
        return solved(hessian, self.reached.T).T  # (2)

    def correlations(self, d: Float[Tensor, "d_out d"]) -> Float[Tensor, " d_out"]:
        """ρ of every output of D x with e, about their means; 0 where one of them is constant."""
        together = (d * (self.reached - self.centre[:, None] * self.mean)).sum(1)
        found = ((d @ (self.gram - self.mean[:, None] * self.mean)) * d).sum(1)
        scale = (found.clamp_min(0) * (self.power - self.centre.square()).clamp_min(0)).sqrt()
        return torch.where(scale > 0, together / scale, 0.0)

    def factors(self, damping: float, rank: int, truncate: Truncate) -> tuple[Tensor, Tensor]:
        """P of (3) or (4) as left (d_out, r) · right (r, d), in float64, both factors with columns or rows of one norm.

        Args:
            damping: of (1).
            rank: r.
            truncate: which of the two.
        """
        d = self.ridge(damping)
        if truncate == "optimal":
            met = d @ self.reached.T
            basis = torch.linalg.eigh((met + met.T) / 2).eigenvectors[:, -rank:].flip(1)
            left, right = basis, basis.T @ d  # (3)
        else:
            rho = self.correlations(d)
            omega = torch.sigmoid((rho - rho.mean()) / SHARPNESS)[:, None]
            u, s, v = torch.linalg.svd(omega * d, full_matrices=False)
            left, right = u[:, :rank] / omega, s[:rank, None] * v[:rank]  # (4)
        norms = left.norm(dim=0), right.norm(dim=1)
        scale = torch.where(norms[1] > 0, norms[1] / norms[0], 1.0).sqrt()
        return left * scale, right / scale[:, None]

    def error(self, p: Float[Tensor, "d_out d"]) -> float:
        """E‖e - P x‖²."""
        return float(self.power.sum() - 2 * (p * self.reached).sum() + ((p @ self.gram) * p).sum())


def _open(sites: Sequence[Site]) -> list[Site]:
    """The MLPs that may get a map: all that may lose something, but for the last of all."""
    mlps = [site for site in sites if site.kind == "mlp"]
    return [site for site in mlps[:-1] if not site.spared]


def _missing(here: SubLayer, aim: Aim) -> Iterator[tuple[Tensor, Tensor, float]]:
    """x, e and ‖y‖² of the small MLP."""
    for i in range(len(here)):
        wanted = here.wanted(i, aim)
        missing = (wanted - here.made(i)).flatten(0, -2)
        yield here.entering(i).flatten(0, -2), missing, float(wanted.square().sum(dtype=torch.float64))


def _dense(here: SubLayer) -> Iterator[tuple[Tensor, Tensor, float]]:
    """x, y and ‖y‖² of the MLP in the dense model."""
    first, dtype = here.twin.piece.adapter.maps(here.dense_block, here.site)[0], here.linear.weight.dtype
    caught = partial(here.twin.dense.caught, first, here.dense_block, here.site)
    for i in range(len(here)):
        wanted = here.wanted(i, "dense").flatten(0, -2)
        yield caught(i).flatten(0, -2).to(dtype), wanted, float(wanted.square().sum(dtype=torch.float64))
