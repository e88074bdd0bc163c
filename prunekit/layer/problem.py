"""One linear map, the moments of its inputs, and answers to the question which groups to keep.

    y = W x,   x̂ what the layer will see,   H = E[x̂ x̂ᵀ],   R = E[y x̂ᵀ],   E(Ŵ) = E‖y - Ŵ x̂‖²

A pruner reads a `LayerProblem` and returns `Candidate`s; it never sees a model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunekit.layer.candidates import Candidate, narrow_product, product
from prunekit.layer.solving import factored, inverted, margin, solved
from prunekit.layer.statistics import Need, named, required
from prunekit.layer.sublayer import SubLayer
from prunekit.space.forms import GROUPS, Form, Units, Values

VALUES_AT_ONCE = 2**22  # of what is judged at once: 32 MiB in float64
CELLS_AT_ONCE = 2**24  # of the matrices that are solved side by side: 128 MiB in float64
FISHER_DAMPING = 0.01  # of F, as a share of the mean of its diagonal
TILE = 512  # rows and columns of a matrix that are compared at once: 2 MiB in float64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Producer:
    """A linear map in front of the layer, whose rows feed its groups.

    Its rows are n_groups equal blocks in the order of the groups: gate or up rows of a neuron, query, key or value
    rows of a head. Statistics are there when the plug-in `needs` them: gradient and fisher, (rows, d), and those that
    are taken of producer layers, as power, (d,).
    """

    name: str  # path inside its decoder block
    weight: Float[Tensor, "rows d"]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def require(self, statistic: Need) -> Tensor:
        """A statistic that the plug-in `needs`.

        Raises:
            PluginError: it is not there; says what is.
        """
        return required(self.name, self.statistics, statistic)

    def to(self, device: torch.device) -> Producer:
        """The same on a device."""
        return replace(self, weight=self.weight.to(device), statistics=_on(device, self.statistics))


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """Everything a local pruner may know of one linear map.

    Groups are contiguous: group g holds the columns g·size … (g+1)·size - 1. Weights are (d_out, d_in).
    Moments are means over tokens. Fields after `damping` are there when the plug-in `needs` them, and so are
    statistics, each one number or of every input column. Two are of other passes: gradient E[∂L/∂W], with fisher
    E[(∂L/∂W)²], both of the weight's shape, L the dense model's next-token cross-entropy in nats per token on one
    window of calibration tokens; and contrast E[x̂_j²] on the second data set. The statistic output-fisher is
    F = E[g gᵀ] (d_out, d_out), g the gradient at the output y of the log-likelihood of labels that the model says.
    """

    weight: Float[Tensor, "d_out d_in"]
    gram: Float[Tensor, "d_in d_in"]  # H = E[x̂ x̂ᵀ]
    group_size: int = 1
    form: Form = GROUPS  # of single weights a group is a column, a count the weights kept per row; or counts are ranks,
    # or the values of a head
    damping: float = 0.01  # ridge, as a share of the mean of diag H
    cross: Float[Tensor, "d_out d_in"] | None = None  # R = E[y x̂ᵀ], y = W x with the dense model's input x
    drift: Float[Tensor, "d_out d_in"] | None = None  # D = E[δ x̂ᵀ], δ what earlier layers lost in the residual stream
    energy: float | None = None  # E‖W x‖² on dense inputs; from the gram when there is no cross
    statistics: Mapping[str, Tensor] = field(default_factory=dict)  # by name; `require` one
    producers: tuple[Producer, ...] = ()
    sublayer: SubLayer | None = None  # which the layer ends, to be run with other weights
    name: str = "layer"

    def __post_init__(self) -> None:
        d_in = self.weight.shape[1]
        if tuple(self.gram.shape) != (d_in, d_in) or d_in % self.group_size:
            raise ValueError(
                f"{self.name}: {d_in} input columns need a ({d_in}, {d_in}) gram and a group size that divides "
                f"{d_in}, not {tuple(self.gram.shape)} and {self.group_size}"
            )
        if self.cross is not None and self.cross.shape != self.weight.shape:
            raise ValueError(
                f"{self.name}: its cross moment E[y x̂ᵀ] is {tuple(self.weight.shape)}, as its weight is, "
                f"not {tuple(self.cross.shape)}"
            )
        for producer in self.producers:
            if len(producer.weight) % self.most:
                raise ValueError(f"{self.name}: {len(producer.weight)} rows of {producer.name}, {self.most} groups")
        for whose, owner in (("its", self), *((f"{producer.name}'s", producer) for producer in self.producers)):
            for name, value in {**vars(owner), **owner.statistics}.items():
                if isinstance(value, Tensor) and not _finite(torch.atleast_1d(value)):
                    raise ValueError(
                        f"{self.name}: {whose} {name} is not finite; look at the model and the calibration tokens"
                    )

    def require(self, statistic: Need) -> Tensor:
        """What the plug-in `needs`, by its name or as the object that it asked for; never None.

        Raises:
            PluginError: it is not there; says what is.
        """
        own = {"gram": self.gram, "cross": self.cross, "drift": self.drift}
        return required(self.name, {**own, **self.statistics}, statistic)

    def to(self, device: torch.device) -> LayerProblem:
        """The same layer on a device; not one with a sub-layer, which stays where the model is."""
        if self.weight.device == device:
            return self
        cross, drift = (None if each is None else each.to(device) for each in (self.cross, self.drift))
        return replace(
            self, weight=self.weight.to(device), gram=self.gram.to(device), cross=cross, drift=drift,
            statistics=_on(device, self.statistics), producers=tuple(each.to(device) for each in self.producers),
        )  # fmt: skip

    def restricted_to(self, needs: frozenset[Need]) -> LayerProblem:
        """The same layer with what `needs` names and no more, so that no plug-in depends on the needs of another."""
        names = named(needs)
        asked = names | {"fisher"} if "gradient" in names else names  # comes with it

        def known(statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {name: value for name, value in statistics.items() if name in asked}

        of_producers = {"producers", *(name for producer in self.producers for name in producer.statistics)}
        producers = tuple(replace(producer, statistics=known(producer.statistics)) for producer in self.producers)
        paired = bool({"cross", "drift"} & names)
        return replace(
            self,
            cross=self.cross if paired else None,
            energy=self.energy if paired else None,
            drift=self.drift if "drift" in names else None,
            statistics=known(self.statistics),
            producers=producers if names & of_producers - self.statistics.keys() else (),
            sublayer=self.sublayer if "sub-layer" in names else None,
        )

    @property
    def structure(self) -> Units:
        """groups, weights, n:m, low-rank, or values."""
        return self.form.units

    @property
    def m(self) -> int:
        """m of n:m; 0 elsewhere."""
        return self.form.m

    @property
    def d_in(self) -> int:
        return self.weight.shape[1]

    @property
    def n_groups(self) -> int:
        return self.d_in // self.group_size

    @property
    def most(self) -> int:
        """The count of all there is; of low rank, less than the columns."""
        return self.form.most(self.n_groups, self.d_in, len(self.weight))

    @cached_property
    def ridge(self) -> float:
        """λ = damping · mean diag H, ten times more (at most 4 times) until H + λI has a Cholesky factor with a margin.

        With the margin every part of it has one, in every order, on any processor. 1 where nothing reaches the layer.

        Raises:
            ValueError: no such λ; the gram is no second moment.
        """
        scale = float(self.gram.diagonal().double().mean())
        if scale <= 0:
            return 1.0
        ridge, gram = self.damping * scale, _mirrored(self.gram)
        for tries in range(5):
            trial = _with_diagonal(gram, ridge)
            trial.diagonal().mul_(1 - margin(self.d_in))
            if not bool(torch.linalg.cholesky_ex(trial).info):
                if tries:
                    share = ridge / scale
                    _log.info("%s: damping is %.1e, not %.1e, for H is singular", self.name, share, self.damping)
                return ridge
            ridge = max(10 * ridge, 1e-8 * scale)
        raise ValueError(
            f"{self.name}: H + λI has no Cholesky factor up to λ = {ridge / 10:.1e}, mean diag H = {scale:.1e}; "
            "accumulate the moments in float32 or better, on more tokens, or raise `damping`"
        )

    @cached_property
    def hessian(self) -> Float[Tensor, "d_in d_in"]:
        """H + λI in float64: solve with it; judge with `gram`."""
        return _with_diagonal(_mirrored(self.gram), self.ridge)

    @cached_property
    def target(self) -> Float[Tensor, "d_out d_in"]:
        """W* = (R + λW + D) (H + λI)⁻¹ in float64, the best weight when nothing is removed.

        Any symmetric method run on W* solves the asymmetric problem. W itself when there is no cross. With
        the drift D the layer aims at W x + δ: it brings the sum it is added to back to the dense model's.
        """
        weight = self.weight.double()
        if self.cross is None:
            return weight
        reached = self.cross.double() + self.ridge * weight
        if self.drift is not None:
            reached = reached + self.drift.double()
        return solved(self.hessian, reached.T).T

    @cached_property
    def output_root(self) -> Float[Tensor, "d_out d_out"]:
        """R in float64, RᵀR = F + 0.01 mean diag F I, F the statistic output-fisher: ½ ‖R e‖² is, to second order, what
        an error e of the output costs in nats. Zeros where nothing behind the layer reads it."""
        fisher = _mirrored(self.require("output-fisher"))
        scale = float(fisher.diagonal().mean())
        return factored(_with_diagonal(fisher, FISHER_DAMPING * scale)).T if scale > 0 else fisher.zero_()

    def nats(self, weight: Float[Tensor, "d_out d_in"], root: Float[Tensor, "d_out d_out"]) -> float:
        """½ tr[R (W* - Ŵ)(H + λI)(W* - Ŵ)ᵀ Rᵀ]: what Ŵ costs over W*, in nats per token, to second order; R the
        `output_root`.

        With the Kronecker form E[g gᵀ ⊗ x̂ x̂ᵀ] = F ⊗ H of K-FAC (Martens & Grosse 2015, arXiv 1503.05671), which LLM
        Surgeon prunes with (van der Ouderaa et al. 2023, arXiv 2312.17244).
        """
        return 0.5 * _energy(root @ (self.target - weight.double()), self.hessian)

    def group_sum(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, " n_groups"]:
        """Sum over rows, then over the columns of each group, in float64."""
        rows = x.reshape(-1, self.d_in).sum(0, dtype=torch.float64)
        return rows.reshape(self.n_groups, self.group_size).sum(1)

    def columns(self, groups: Sequence[int]) -> Tensor:
        """Input columns of `groups`, in the order given."""
        ids = torch.as_tensor(list(groups), dtype=torch.long, device=self.weight.device)
        return (ids[:, None] * self.group_size + torch.arange(self.group_size, device=ids.device)).flatten()

    def rounded(self, weight: Float[Tensor, "d_out columns"]) -> Float[Tensor, "d_out columns"]:
        """In the dtype of the weight; what is too large for it is its largest number, for the error to judge."""
        most = torch.finfo(self.weight.dtype).max
        return weight.clamp(-most, most).to(self.weight.dtype)

    def masked(self, groups: Sequence[int], scales: Float[Tensor, " kept"] | None = None) -> Candidate:
        """Keep `groups` with their weights as they are, or those of each multiplied by its scale."""
        values = self.weight[:, self.columns(groups)]
        if scales is not None:
            values = values.double() * scales.to(values.device).double().repeat_interleave(self.group_size)
        return self._placed(groups, values)

    def refitted(self, groups: Sequence[int]) -> Candidate:
        """Keep `groups`, with the least-squares weights Ŵ_K = W* H_:K (H_KK)⁻¹."""
        if len(groups) == self.n_groups:
            return self._whole()
        groups = sorted(groups)  # the same set, the same bits
        kept = self.columns(groups)
        reached = self.target @ self.hessian[:, kept]
        return self._placed(groups, solved(self.hessian[kept][:, kept], reached.T).T if groups else reached)

    def sparse(self, mask: Bool[Tensor, "d_out d_in"]) -> Candidate:
        """Keep the single weights under `mask` as they are."""
        return Candidate(None, torch.where(mask, self.weight, 0))

    def refitted_rows(self, mask: Bool[Tensor, "d_out d_in"]) -> Candidate:
        """Keep the single weights under `mask`, with the least-squares weights of every row on its own support.

            ŵ_K = w* H_:K (H_KK)⁻¹  =  w*_K - w*_P (V_PP)⁻¹ V_PK        K kept, P removed, V = H⁻¹

        Exact: one Cholesky factor per row, on the left where less is kept than removed, on the right otherwise.
        """
        if 2 * int(mask.sum()) < mask.numel():
            fitted = _solved_rows(self.hessian, self.target @ self.hessian, mask)
        else:
            inverse = inverted(self.hessian)
            fitted = self.target - _solved_rows(inverse, self.target, ~mask) @ inverse
        return Candidate(None, self.rounded(torch.where(mask, fitted, 0)))

    def nested(self, ranking: Sequence[int]) -> Nested:
        """The refits of the first 0, 1, … n_groups groups of a ranking, from one factorisation."""
        return Nested(self, tuple(ranking))

    def truncated(self, basis: Float[Tensor, "d_out m"]) -> Truncated:
        """The truncations U_r U_rᵀ W* to all ranks r, U_r the first r of orthonormal columns that span those of W*."""
        return Truncated(self, basis)

    def narrowed(self, left: Float[Tensor, "d_out columns"], right: Float[Tensor, "rows width"]) -> Candidate:
        """The candidate of narrower values from the factors of `narrow_product`; the weight itself where nothing gets
        narrower.

        Args:
            left: U_h (d_out, r) of all query heads, side by side.
            right: B_g (r, width) of all KV heads, one below the other.
        """
        assert isinstance(self.form, Values)
        if left.shape[1] == self.d_in:
            return Candidate(None, self._whole().weight)
        left, right = self.rounded(left), self.rounded(right)
        return Candidate(None, self.rounded(narrow_product(left, right, self.form.heads)), (left, right))

    def _whole(self) -> Candidate:
        """Keep everything: the weight itself, bit for bit, unless other inputs ask for W*."""
        groups = range(self.n_groups)
        return self.masked(groups) if self.cross is None else self._placed(groups, self.target)

    def _placed(self, groups: Sequence[int], values: Float[Tensor, "d_out kept"]) -> Candidate:
        """The candidate whose columns of `groups`, in the order given, hold `values`."""
        weight = torch.zeros_like(self.weight)
        weight[:, self.columns(groups)] = self.rounded(values)
        return Candidate(tuple(sorted(int(g) for g in groups)), weight)

    def error(self, weight: Float[Tensor, "d_out d_in"]) -> float:
        """E(Ŵ) / E‖W x‖²: relative output error, 0 lossless, 1 as bad as zeros."""
        power = self.power
        if self.cross is None:
            error = _energy(self.weight, self.gram, weight)
        else:
            error = power - 2 * float((weight.double() * self.cross).sum()) + _energy(weight, self.gram)
        return max(error, 0.0) / power if power > 0 else 0.0

    def errors(self, nested: Nested | Truncated) -> Float[Tensor, " counts"]:
        """`error` of the refits at every count, on damped moments, or of truncations, on H itself; before they are
        rounded."""
        if self.power <= 0:
            return torch.zeros_like(nested.losses)
        return self.error(nested.layer.target) + nested.losses / self.power

    @cached_property
    def power(self) -> float:
        """E‖W x‖², which errors are relative to."""
        if self.energy is not None:
            return self.energy
        if self.cross is not None:
            raise ValueError(f"{self.name}: a problem with a cross moment needs the dense energy E‖W x‖²")
        return _energy(self.weight, self.gram)


def judging_flops(d_in: int, d_out: int, widths: Iterable[int], *, cross: bool) -> int:
    """Of the relative errors of candidates with so many columns, in float64, and the energy they are relative to.

    With the dense model beside them that is known, and columns that are gone cost nothing; else most may differ.
    """
    return 2 * d_out * (sum(width**2 for width in widths) if cross else d_in**2 * (1 + len(list(widths))))


@dataclass(frozen=True, eq=False)
class Nested:
    """All counts of one ranking, each refitted on its kept groups, for the price of one.

    Order the columns as ranked and let H = L Lᵀ be the damped Hessian in that order. Since the leading k rows of
    L depend on the leading k columns alone, one factor serves every count:

        Z   = Lᵀ W*ᵀ                   (d_in, d_out)                                      (1)
        Ŵ_k = (M_kᵀ Z_k)ᵀ              M = L⁻¹, M_k and Z_k its first k rows               (2)
        E_k = Σ_{i ≥ k} ‖Z_i‖²         E_k = tr (W* - Ŵ_k) H (W* - Ŵ_k)ᵀ, never cancels    (3)

    Ŵ_k equals `LayerProblem.refitted`; from one count to the next only new rows of M and Z are multiplied.
    """

    layer: LayerProblem
    ranking: tuple[int, ...]  # all group ids, the last to be removed first

    @cached_property
    def _columns(self) -> Tensor:
        return self.layer.columns(self.ranking)

    @cached_property
    def _factor(self) -> Float[Tensor, "d_in d_in"]:
        return factored(self.layer.hessian[self._columns][:, self._columns])

    @cached_property
    def _energy(self) -> Float[Tensor, "d_in d_out"]:
        return self._factor.T @ self.layer.target.T[self._columns]  # (1)

    @property
    def losses(self) -> Float[Tensor, " counts"]:
        """E_k at every count of kept groups 0 … n_groups, on damped moments."""
        return self._behind(self._energy)  # (3)

    def nats(self, root: Float[Tensor, "d_out d_out"]) -> Float[Tensor, " counts"]:
        """½ Σ_{i ≥ k} ‖R Z_i‖² at every count: as `LayerProblem.nats` of the refits, before they are rounded."""
        return self._behind(self._energy @ root.T).div_(2)

    def _behind(self, rows: Float[Tensor, "d_in d_out"]) -> Float[Tensor, " counts"]:
        """Σ_{i ≥ k} of squares, at every count k of groups."""
        rises = rows.square().sum(1).reshape(-1, self.layer.group_size).sum(1)
        return torch.cat([rises.flip(0).cumsum(0).flip(0), rises.new_zeros(1)])

    def candidates(self, keeps: Sequence[int]) -> list[Candidate]:
        """One candidate for every count of kept groups, in the order of `keeps`."""
        layer, size = self.layer, self.layer.group_size
        most = size * max((k for k in keeps if k < layer.n_groups), default=0)
        factor = self._factor[:most, :most] if most else layer.hessian[:0, :0]
        inverse = torch.linalg.solve_triangular(factor, torch.eye(most).to(factor), upper=False)  # M
        fitted = layer.hessian.new_zeros(most, layer.weight.shape[0])
        found, done = {layer.n_groups: layer._whole()}, 0
        for keep in sorted({*keeps} - {layer.n_groups}):
            new, done = slice(done, keep * size), keep * size
            fitted[:done] += inverse[new, :done].T @ self._energy[new] if done else 0.0  # (2), the new rows
            found[keep] = layer._placed(self.ranking[:keep], fitted[:done].T)
        return [found[keep] for keep in keeps]


@dataclass(frozen=True, eq=False)
class Truncated:
    """All ranks along one orthonormal basis of the outputs, for the price of one.

    Let U (d_out, m) have orthonormal columns that span those of W*, the first ones the most important, and U_r be the
    first r of them. Whatever whitens the inputs, a truncated singular value decomposition has this form: of
    W* S = U Σ Vᵀ, U_r Σ_r V_rᵀ S⁻¹ = U_r U_rᵀ W*, so that no S is inverted.

        Ŵ_r = U_r (U_rᵀ W*)                                                                 (1)
        E_r = tr (W* - Ŵ_r) H (W* - Ŵ_r)ᵀ = Σ_{i > r} u_iᵀ W* H W*ᵀ u_i                      (2)
        ½ ‖R (W* - Ŵ_r) (H + λI)^½‖² = ½ Σ_{i, j > r} (u_iᵀ W* (H + λI) W*ᵀ u_j) (u_iᵀ RᵀR u_j)   (3)

    Where U has the singular vectors of W* S, S Sᵀ = H, (2) is the sum of the squared singular values beyond r. It never
    falls short of that (Eckart & Young 1936), for any U.
    """

    layer: LayerProblem
    basis: Float[Tensor, "d_out m"]

    @cached_property
    def _rows(self) -> Float[Tensor, "m d_in"]:
        return self.basis.T @ self.layer.target  # UᵀW*

    @property
    def losses(self) -> Float[Tensor, " counts"]:
        """E_r at every count 0 … `layer.most`, of which 0 is no rank that can be asked for, and the last the weight."""
        energy = ((self._rows @ self.layer.gram.double()) * self._rows).sum(1)
        return self._behind(energy)  # (2)

    def nats(self, root: Float[Tensor, "d_out d_out"]) -> Float[Tensor, " counts"]:
        """(3) at every count: as `LayerProblem.nats` of the truncations, before they are rounded."""
        weighed = root @ self.basis
        pairs = (self._rows @ self.layer.hessian @ self._rows.T) * (weighed.T @ weighed)
        whole = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)  # Σ_{i, j ≥ r}, at every r
        return self._ended(whole).div_(2)  # (3)

    def _behind(self, rises: Float[Tensor, " m"]) -> Float[Tensor, " counts"]:
        return self._ended(rises.flip(0).cumsum(0).flip(0))

    def _ended(self, sums: Float[Tensor, " m"]) -> Float[Tensor, " counts"]:
        """Of the ranks that are counts; nothing is lost at the last count."""
        return torch.cat([sums[: self.layer.most], sums.new_zeros(1)]).clamp_(min=0)

    def candidates(self, keeps: Sequence[int]) -> list[Candidate]:
        """One candidate for every count, in the order of `keeps`; both factors have rows or columns of equal norms."""
        norms = self._rows.norm(dim=1)
        scale = torch.where(norms > 0, norms, 1).sqrt()
        left, right = self.layer.rounded(self.basis * scale), self.layer.rounded(self._rows / scale[:, None])
        return [self._of_rank(left[:, :keep].clone(), right[:keep].clone()) for keep in keeps]

    def _of_rank(self, left: Float[Tensor, "d_out r"], right: Float[Tensor, "r d_in"]) -> Candidate:
        """(1), or the weight itself where that has no more parameters."""
        if len(right) == self.layer.most:
            return Candidate(None, self.layer._whole().weight)
        return Candidate(None, self.layer.rounded(product(left, right)), (left, right))


def _solved_rows(
    matrix: Float[Tensor, "n n"], right: Float[Tensor, "rows n"], mask: Bool[Tensor, "rows n"]
) -> Float[Tensor, "rows n"]:
    """right_K (matrix_KK)⁻¹ for every row, on its own K = mask, and 0 elsewhere."""
    found, counts = torch.zeros_like(right), mask.sum(1)
    order = counts.argsort(descending=True, stable=True)  # rows of one batch have about as many weights
    while len(order) and (most := int(counts[order[0]])):
        batch = max(1, CELLS_AT_ONCE // most**2)
        rows, order = order[:batch], order[batch:]
        ids = (~mask[rows]).byte().argsort(dim=1, stable=True)[:, :most]  # K, then what pads it
        real = mask[rows].gather(1, ids)
        cells = torch.where(real[:, :, None] & real[:, None], matrix[ids[:, :, None], ids[:, None]], 0)
        cells.diagonal(dim1=1, dim2=2).add_((~real).to(cells))
        values = torch.where(real, right[rows].gather(1, ids), 0)
        found[rows[:, None], ids] = solved(cells, values[..., None])[..., 0]
    return found


def _on(device: torch.device, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: value.to(device) for name, value in statistics.items()}


def _finite(value: Tensor) -> bool:
    """A sum is finite only when all terms are; float64 because half precision overflows, some rows at a time."""
    rows = max(1, VALUES_AT_ONCE // max(1, value[:1].numel()))
    return all(bool(torch.isfinite(some.sum(dtype=torch.float64))) for some in value.split(rows))


def _energy(weight: Tensor, gram: Tensor, less: Tensor | None = None) -> float:
    """tr V H Vᵀ in float64, V the weight, less another one; columns of V that are zero cost nothing.

    Some rows and columns at a time, for wide maps are large in float64.
    """
    there = (weight != (0 if less is None else less)).any(0).nonzero().flatten()
    whole = len(there) == weight.shape[1]
    if not whole:
        weight, less = weight[:, there], None if less is None else less[:, there]
    at_once, total = max(1, VALUES_AT_ONCE // max(1, len(there))), gram.new_zeros((), dtype=torch.float64)
    for start in range(0, len(there), at_once):
        some = slice(start, start + at_once)
        columns = (gram[:, some] if whole else gram[there[:, None], there[some]]).double()
        for one, other in zip(weight.split(at_once), (weight if less is None else less).split(at_once), strict=True):
            v = one.double() if less is None else one.double() - other.double()
            total += ((v @ columns) * v[:, some]).sum()
    return float(total)


def _mirrored(gram: Tensor) -> Tensor:
    """In float64 and symmetric: not every processor's xᵀx is, to the last bit, and an order would choose a half."""
    gram, starts = gram.double(), range(0, len(gram), TILE)
    tiles = [(slice(i, i + TILE), slice(j, j + TILE)) for i in starts for j in starts if j <= i]
    if all(torch.equal(gram[i, j], gram[j, i].T) for i, j in tiles):  # same as: torch.equal(gram, gram.T), in a cache
        return gram
    return gram.tril().add_(gram.tril(-1).T)


def _with_diagonal(matrix: Tensor, value: float) -> Tensor:
    matrix = matrix.clone()
    matrix.diagonal().add_(value)
    return matrix
