"""Scores of groups and of single weights, all in one go: the size of the weights times the size of their inputs.

One general pruner; every paper below it is the same formula with other exponents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import LayerProblem, check_choices
from prunekit.layer.candidates import Per
from prunekit.plugins.pruner import Within
from prunekit_strategies.pruners.ranking import Ranking

Activation = Literal["rms", "std", "absolute", "relative", "contrast", "std+relative"]
Reduce = Literal["sum", "mean", "max", "rms"]
Scope = Literal["columns", "coupled"]
Standardise = Literal["units", "channels"]

NEEDS: dict[Activation, frozenset[str]] = {
    "rms": frozenset({"gram"}),
    "std": frozenset({"variance"}),
    "absolute": frozenset({"absolute"}),
    "relative": frozenset({"relative"}),
    "contrast": frozenset({"gram", "contrast"}),
    "std+relative": frozenset({"variance", "relative"}),
}


@dataclass(frozen=True)
class Score(Ranking):
    """Keep the groups, or the single weights, of largest score: a norm of weights times a power of their inputs.

        s_j = (Σ_i |W_ij|^p)^(q/p) x_j^a           p, q, a: weight_norm, weight_power, activation_power   (1)
        u_g = reduce of s_j over the columns j of group g                                                 (2)
        u_g ← u_g + Σ_f reduce over rows r of g of (Σ_j (|F_rj| z_j^{a/q})^p)^(q/p)      scope: coupled    (3)
        s_ij = |W_ij|^q x_j^a                single weights, and n:m                                      (4)
        s_j ← (s_j - mean s) / std s         before (2), over the columns of W        standardise: channels (5)

    W (d_out, d_in) is the layer, x_j a statistic of its input j: `rms` √E[x_j²]; `std`, about the mean; `absolute`,
    of the mean |x_j| of windows; `relative` √E[x_j² / ‖y‖²], y the layer's output; `contrast`
    √max(0, E[x_j²] - E'[x_j²]), E' on the second data set; `std+relative` the sum of two, each over its mean.
    F (rows, d) are the maps in front, whose rows go with a group, z_j the rms of their inputs. q = 0 leaves the weights
    out, a = 0 the inputs. On a tie the lower id stays.

    Single weights compete within their row, their layer or their pattern; norms, reduce and scope are of groups only.
    (5) is for allocators that compare the groups of all sites, to be taken as they are: `global-rank` with
    `normalise: none`. Within a site the order stays: rms then is the mean of the squares' z, a sum the mean.

    Sources: the subclasses, each a paper. Ours: a group is what can be removed, a KV head with its query heads or
    one of the MLP's neurons, and every score is taken on the inputs that pruned blocks carry here.
    """

    structures: ClassVar[frozenset[str]] = frozenset({"groups", "weights", "n:m"})

    weight_norm: float = 1.0
    weight_power: float = 1.0
    activation: Activation = "rms"
    activation_power: float = 1.0
    reduce: Reduce = "sum"
    scope: Scope = "columns"  # coupled: rows of the maps in front count as well
    standardise: Standardise = "units"  # channels: (5); units: nothing here, z-scores of groups are an allocator's part
    per: Per = "row"  # among which single weights compete
    refit: bool = False  # least-squares weights on what is kept; False: as they are
    within: Within = "map"  # inputs behind the pruned maps of the layer's own block, or behind its dense ones

    def __post_init__(self) -> None:
        check_choices(self)
        if self.weight_norm <= 0 or self.weight_power < 0 or self.activation_power < 0:
            raise ValueError(
                "weight_norm > 0, weight_power ≥ 0 and activation_power ≥ 0 are needed, not "
                f"{self.weight_norm}, {self.weight_power} and {self.activation_power}"
            )
        if not (self.weight_power or self.activation_power):
            raise ValueError("with weight_power = 0 and activation_power = 0 all groups score alike; raise one of them")
        if self.scope == "coupled" and not (self.weight_power and (self._quiet or self.activation == "rms")):
            raise ValueError(
                "scope coupled scores rows by their weights and the rms of their inputs; "
                "it needs weight_power > 0, and activation rms or activation_power = 0"
            )

        if self.scope == "coupled" and self.standardise == "channels":
            raise ValueError("standardise channels is of the layer's own columns; it needs scope columns")

    @property
    def _quiet(self) -> bool:
        """The inputs have no say."""
        return self.activation_power == 0

    @property
    def needs(self) -> frozenset[str]:
        needs = frozenset({"gram"} if self.refit else ())
        if not self._quiet:
            needs |= NEEDS[self.activation]
        if self.scope == "coupled":
            needs |= {"producers"} if self._quiet else {"producers", "power"}
        return needs

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        """u_g in float64."""
        columns = self._fibres(layer.weight, self._inputs(layer), 0)  # (1)
        if self.standardise == "channels":
            return self._standing(columns, layer.n_groups)
        score = self._reduced(columns, layer.n_groups)  # (2)
        if self.scope == "columns":
            return score
        fed = torch.zeros_like(score)
        for producer in layer.producers:
            inputs = None if self._quiet else producer.require("power").double().sqrt()
            fed += self._reduced(self._fibres(producer.weight, inputs, 1), layer.n_groups)
        return score + fed  # (3)

    def cells(self, layer: LayerProblem) -> Float[Tensor, "d_out d_in"]:
        """s_ij of single weights, in float64."""
        inputs = self._inputs(layer)
        score = layer.weight.double().abs() ** self.weight_power
        return score if inputs is None else score * inputs**self.activation_power  # (4)

    def _inputs(self, layer: LayerProblem) -> Float[Tensor, " d_in"] | None:
        """x_j, or None where the inputs have no say."""
        if self._quiet:
            return None
        if self.activation == "absolute":
            return layer.require("absolute").double()
        if self.activation == "std+relative":
            parts = [layer.require(name).double().clamp_min(0).sqrt() for name in ("variance", "relative")]
            return torch.stack([x / x.mean() if x.any() else x for x in parts]).sum(0)
        if self.activation in ("std", "relative"):
            power = layer.require("variance" if self.activation == "std" else "relative").double()
        else:
            power = layer.gram.diagonal().double()
        if self.activation == "contrast":
            power = power - layer.require("contrast").double()
        return power.clamp_min(0).sqrt()

    def _fibres(self, weight: Float[Tensor, "m n"], inputs: Float[Tensor, " n"] | None, dim: int) -> Tensor:
        """Norms over `dim` of weights times inputs, to the power q."""
        p, q, a = self.weight_norm, self.weight_power, self.activation_power
        if inputs is not None and not q:
            return inputs**a
        cells = weight.double().abs()
        if inputs is not None:
            cells = cells * inputs ** (a / q)
        return cells.pow(p).sum(dim).pow(q / p)

    def _standing(self, columns: Float[Tensor, " d_in"], n_groups: int) -> Float[Tensor, " n_groups"]:
        """(5), (2); zeros where all columns are alike."""
        if self.reduce == "rms" and len(columns) > n_groups:
            columns = columns.square()
        apart = columns - columns.mean()
        spread = apart.norm() / max(len(columns) - 1, 1) ** 0.5
        apart = apart / spread if spread > 1e-12 * columns.abs().max() else torch.zeros_like(apart)
        units = apart.reshape(n_groups, -1)
        return units.amax(1) if self.reduce == "max" else units.mean(1)

    def _reduced(self, fibres: Float[Tensor, " fibres"], n_groups: int) -> Float[Tensor, " n_groups"]:
        units = fibres.reshape(n_groups, -1)
        if self.reduce == "rms":
            return units.square().mean(1).sqrt()
        return {"sum": units.sum, "mean": units.mean, "max": units.amax}[self.reduce](1)


@dataclass(frozen=True)
class Magnitude(Score):
    """Keep the largest weights: of groups with everything that goes with them, or single ones of the layer.

        u_g = ‖W_:g‖²_F + Σ_f ‖rows of F that feed g‖²,        s_ij = W_ij²

    The baseline that reads no tokens.
    """

    weight_norm: float = 2.0
    weight_power: float = 2.0
    activation_power: float = 0.0
    scope: Scope = "coupled"
    per: Per = "layer"


@dataclass(frozen=True)
class Wanda(Score):
    """Keep the largest weights times input norms, single or summed over groups.

        s_ij = |W_ij| ‖x_j‖,        u_g = Σ_{j ∈ g} Σ_i s_ij            ‖x_j‖ root mean square over tokens

    Source: Sun et al. 2024 (arXiv 2306.11695), eq. 1, for single weights, row by row; Wanda-sp of FLAP (An et al.
    2024, arXiv 2312.11983) for groups, with the mean where we take the sum: groups of a site have one size, so the
    order is the same. (|W_ij| ‖x_j‖)² is the exact error of zeroing that weight alone. Their released codes take the
    inputs of all maps of a block while it is dense, as `within: block` does.
    """

    within: Within = "block"


@dataclass(frozen=True)
class FASP(Score):
    """Wanda's column sums, then the kept columns are refitted by least squares.

        u_g = Σ_{j ∈ g} Σ_i |W_ij| ‖x_j‖,    Ŵ_K = (W H)_:K (H_KK + λI)⁻¹

    Source: FASP (arXiv 2501.09412). Ours: the ridge pulls towards the dense weights, not towards zero, and attention
    loses whole KV groups where the paper cuts channels of the values.
    """

    refit: bool = True


@dataclass(frozen=True)
class FLAP(Score):
    """FLAP's WIFV: keep what varies, for a bias can make up for what is constant.

        s_j = var(x_j) Σ_i W_ij²        the exact error of removing column j alone when b ← b + W_:j E[x_j]
        u_g = s_j of a neuron; the mean of s_j² over the columns of a group of heads

    Source: An et al. 2024 (arXiv 2312.11983), with the released code's square for heads. Before it compares layers it
    standardises channels, and averages them into heads then: `standardise: channels`, as the recipe `flap` has it. The
    spread of a layer's heads is so a third to a fifth of that of standardised heads: fewer are the first to go. The
    bias is a finisher's part.
    """

    weight_norm: float = 2.0
    weight_power: float = 2.0
    activation: Activation = "std"
    activation_power: float = 2.0
    reduce: Reduce = "rms"

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        score = super().scores(layer)
        return score.square() if layer.group_size > 1 and self.standardise == "units" else score


@dataclass(frozen=True)
class FLAPVariance(FLAP):
    """FLAP's IFV: the variance of the inputs alone, s_j = var(x_j)."""

    weight_power: float = 0.0


@dataclass(frozen=True)
class FLAPNorm(FLAP):
    """FLAP's WIFN: Wanda's column sums, s_j = Σ_i |W_ij| ‖x_j‖, for groups of heads the mean of their squares."""

    weight_norm: float = 1.0
    weight_power: float = 1.0
    activation: Activation = "rms"
    activation_power: float = 1.0


@dataclass(frozen=True)
class Minitron(Score):
    """Keep the groups whose activations are large; the weights have no say.

        s_j = √ E_windows[ (mean over tokens of |x_j|)² ],     u_g = root mean square of s_j over the group

    Source: Muralidharan et al. 2024 (arXiv 2407.14679), mean over the sequence and l2 over the batch. The paper takes
    a head's norm token by token; here it is taken of the columns' statistics. Depth and the hidden width are no groups.
    """

    weight_power: float = 0.0
    activation: Activation = "absolute"
    reduce: Reduce = "rms"


@dataclass(frozen=True)
class Channel(Score):
    """Independent channel contribution: how large the output of each column is on its own.

        s_j = ‖W_:j‖₂ · |x_j|,     u_g = root mean square of s_j over the group

    Source: the activation scores of NVIDIA's Model-Optimizer. |x_j| is the mean of windows' means there, the root
    mean square of windows' means here.
    """

    weight_norm: float = 2.0
    activation: Activation = "absolute"
    reduce: Reduce = "rms"


@dataclass(frozen=True)
class SafetyPotential(Score):
    """Keep what works on the calibration data and not on a second data set.

        s_ij = |W_ij| √max(0, E[x_j²] - E'[x_j²]),        u_g = Σ_{j ∈ g} Σ_i s_ij

    Source: arXiv 2603.14219, for single weights; the sum over groups is ours. E' is taken over `data.contrast_dataset`,
    on what pruned layers carry. Inputs that the second set drives harder count nothing (an unclamped root would be no
    number).
    """

    activation: Activation = "contrast"
    within: Within = "block"


@dataclass(frozen=True)
class ACE(Score):
    """ACE's VarP: Wanda with the spread of the inputs about their mean in place of their norm.

        s_ij = |W_ij| std(x_j),        u_g = Σ_{j ∈ g} Σ_i s_ij

    Source: ACE (arXiv 2505.21987), whose exact power we did not find; with the first, s_ij² is the exact error of
    removing that weight alone when the bias takes over W_ij E[x_j].
    """

    activation: Activation = "std"
    within: Within = "block"


@dataclass(frozen=True)
class ACEDirection(Score):
    """ACE's CosP: Wanda on tokens that count by their direction, so that loud outputs do not drown quiet ones.

        s_ij = |W_ij| √E[x_j² / ‖y‖²],        u_g = Σ_{j ∈ g} Σ_i s_ij            y = W x, bias included

    Source: ACE (arXiv 2505.21987), which starts from the cosine between y and what pruning makes of it. The term of
    first order in the change Δ of y is zero; for a change of y_i alone the next is Δ² / 2‖y‖² · (1 - y_i² / ‖y‖²), and
    without its last factor, which is near 1 when many outputs share the length of y, it is s_ij² / 2 on average.
    """

    activation: Activation = "relative"
    within: Within = "block"


@dataclass(frozen=True)
class ACECombined(Score):
    """ACE's CosP and VarP together: inputs that vary, and inputs that turn their outputs.

        s_ij = |W_ij| (std(x_j) / mean std + √E[x_j² / ‖y‖²] / mean of it),        u_g = Σ_{j ∈ g} Σ_i s_ij

    Source: ACE (arXiv 2505.21987), which combines the two; derived: the sum, with the same weight for both, whose units
    differ.
    """

    activation: Activation = "std+relative"
    within: Within = "block"
