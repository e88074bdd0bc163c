"""Optimal brain surgeon on groups: remove the cheapest group, let the others make up for it, repeat.

One removal order from dense to the smallest count passes every larger one, so all rungs of a ladder cost one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import Candidate, LayerProblem, LocalPruner, check_choices
from prunekit.layer.problem import Nested
from prunekit_strategies.pruners.obs import removal
from prunekit_strategies.pruners.obs.exchange import exchanged
from prunekit_strategies.pruners.obs.penalty import vanished_set, vanishing

Aim = Literal["own", "dense", "stream"]
Search = Literal["greedy", "score", "swap", "penalty"]
Score = Literal["exact", "grouped-cholesky", "diagonal", "masked", "wanda"]
Slope = Literal["none", "absolute", "signed"]
Penalty = Literal["log", "set"]
NEEDS: Mapping[Aim, Sequence[str]] = {"own": (), "dense": ("cross",), "stream": ("cross", "drift")}


@dataclass(frozen=True)
class OBS(LocalPruner):
    """Structured optimal brain surgeon; by default one group per step, with exact prices and updates.

    W (d_out, d_in) starts at W*, V = (H + λI)⁻¹ (d_in, d_in). Removing the columns P of a group:

        rise       tr[W_P (V_PP)⁻¹ W_Pᵀ]          exact growth of the error      (1)
        weights    W ← W - W_P (V_PP)⁻¹ V_P:      the others compensate          (2)
        inverse    V ← V - V_:P (V_PP)⁻¹ V_P:     = (H_KK)⁻¹ on what is left     (3)

    Source: ZipLM (Kurtic et al. 2023, arXiv 2302.04089) for one group per step; Hassibi & Stork 1993 for (1)-(3).
    Ours: the search only finds the order, all weights come from one Cholesky factor of H in that order
    (`LayerProblem.nested`), because every correct compensation of a set is its least-squares refit.

    What W* is depends on the aim, for dense inputs x, inputs x̂ behind pruned layers, and δ, what the residual
    stream has lost before this sub-layer is added to it:

        own       W x̂        W* = W
        dense     W x        W* = W (G + λI) (H + λI)⁻¹              (4)
        stream    W x + δ    W* = (W (G + λI) + D) (H + λI)⁻¹        (5)

    with G = E[x x̂ᵀ], of which only W G = E[(W x) x̂ᵀ] is ever formed, and D = E[δ x̂ᵀ]. (4) is error correction as in
    OSSCAR (arXiv 2403.12983); (5) is ours: every layer also makes up for what earlier ones could not, as far as a
    linear map of its inputs can. What is made up for on the calibration tokens is made up for less on others, so the
    target may go a part of the way,

        W* ← W + correction (W* - W)                                           (6)

    which is ours too: layers that are fitted one behind the other fit the same tokens again and again.

    The search is for the groups to remove:

        greedy     the cheapest of a step, (2) and (3), and again
        score      the cheapest by their scores in the dense layer, once
        swap       greedy, then exchanges that lower the error (`exchange.py`), for every count anew
        penalty    in the order in which a growing penalty makes them vanish (`log`), or those that one on a set of
                   as many as are to go makes vanish (`set`), for every count anew (`penalty.py`)

    and the score says what a group costs: (1) `exact`, `grouped-cholesky` or `diagonal` (`removal.py`; for single
    columns the three are one); `masked`, the exact growth of the error when nothing compensates; `wanda`,
    Σ |W_ij| √H_jj with the present W.

    Týr-the-Pruner (arXiv 2503.09657) adds the first-order term ⟨W_P, R_P⟩, R = W* (H + λI), to half of (1): `signed` as
    in its released code, `absolute` as in the paper, which we read as the mean over the group's columns of
    |⟨w_j, R_j⟩|. It is off: the terms of all groups sum to ‖W x‖², so they measure the output's size and not a slope
    of the error, which is zero at W*.

    Groups that nothing ever reaches go first. On a tie the lower id stays.
    """

    aim: Aim = "own"  # its own output on what it will see, the dense model's output, or its residual stream
    correction: float = 1.0  # share of what earlier layers changed that is made up for, where the aim is not its own
    search: Search = "greedy"
    score: Score = "exact"  # of greedy, score and the start of swap
    step: tuple[int, int] = (1, 1)  # least and most neurons at once: a sixteenth of what is left
    head_step: int = 1  # groups of more than one column at once: heads
    first_order: Slope = "none"
    exchange: int = 8  # swap: most groups exchanged at once
    tries: int = 16  # swap: most exchanges tried per count
    penalty: Penalty = "log"  # penalty: on the logarithm of every group's weights, or on the squares of a set
    growth: float = 1.3  # penalty: factor from round to round
    refit: bool = True  # least-squares weights on the kept groups; False: as they are

    def __post_init__(self) -> None:
        check_choices(self)
        if not 1 <= self.step[0] <= self.step[1] or min(self.head_step, self.exchange) < 1 or self.tries < 0:
            raise ValueError(
                "1 ≤ step[0] ≤ step[1], head_step ≥ 1, exchange ≥ 1 and tries ≥ 0 are needed, not "
                f"{list(self.step)}, {self.head_step}, {self.exchange} and {self.tries}"
            )
        if not 0 <= self.correction <= 1:
            raise ValueError(f"a correction is a share in 0..1, not {self.correction}")
        if self.growth <= 1:
            raise ValueError(f"a penalty grows by a factor above 1, not {self.growth}")
        if self.first_order != "none" and self.score in ("masked", "wanda"):
            raise ValueError(f"the first-order term is added to a share of (1), which the score {self.score} is not")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram", *NEEDS[self.aim]})

    @property
    def matrices(self) -> int:
        if self.search == "penalty" and self._by_count:
            return 8  # H as it is and of what is live, its inverse, and of the set V_CC, Q, Qᵀ V_Cj and room to find Q
        return 6  # H as it is and of what is live, its inverse and WᵀW, and both of what is left of them

    @property
    def keeps_scales(self) -> bool:
        return not self.refit

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        layer = self._aimed(layer)
        if self._by_count:
            return [layer.refitted(kept) if self.refit else layer.masked(kept) for kept in self._sets(layer, keeps)]
        _, ranking = self._ranked(layer, _smallest(layer, keeps))
        if not self.refit:
            return [layer.masked(ranking[:keep]) for keep in keeps]
        return layer.nested(ranking).candidates(keeps)

    def keep(self, layer: LayerProblem, groups: Sequence[int], scales: Tensor | None = None) -> Candidate:
        return self._aimed(layer).refitted(groups) if self.refit else layer.masked(groups, scales)

    def nested(self, layer: LayerProblem) -> Nested | None:
        if self._by_count or not self.refit:
            return None
        layer = self._aimed(layer)
        return layer.nested(self._ranked(layer, 0)[1])

    @property
    def _by_count(self) -> bool:
        """Whether every count has a set of its own, which need not be part of a larger one's."""
        return self.search == "swap" or (self.search == "penalty" and self.penalty == "set")

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        """By how much the error grew when a group's turn came, the others compensating; on damped moments."""
        layer = self._aimed(layer)
        _, ranking = self._ranked(layer, 0)
        rises = -layer.nested(ranking).losses.diff()
        return torch.empty_like(rises).index_copy_(0, torch.tensor(ranking, device=rises.device), rises)

    def _aimed(self, layer: LayerProblem) -> LayerProblem:
        """The layer without the moments this aim does not ask for, and with (6) for its target."""
        unasked = {"cross", "drift"} - self.needs
        layer = replace(layer, **dict.fromkeys(unasked)) if unasked else layer
        if layer.cross is None or self.correction == 1:
            return layer
        own = layer.weight.double() @ layer.gram.double()  # W H, what there would be to reach if nothing had changed
        cross = own + self.correction * (layer.cross.double() - own)
        return replace(layer, cross=cross, drift=None if layer.drift is None else self.correction * layer.drift)

    def _sets(self, layer: LayerProblem, keeps: Sequence[int]) -> list[list[int]]:
        """The groups kept at every count, where each count has a set of its own."""
        if self.search == "swap":
            live, ranking = self._ranked(layer, _smallest(layer, keeps))
            return live.exchanged(ranking, keeps, self.exchange, self.tries)
        live = _Live(layer)
        v = removal.inverse(live.hessian)  # once for all counts

        def gone(keep: int) -> list[int]:
            return vanished_set(live.hessian, live.weight, live.size, live.n - keep, self.growth, v)

        return [live.ranking(gone(keep))[:keep] if keep else [] for keep in keeps]

    def _ranked(self, layer: LayerProblem, smallest: int) -> tuple[_Live, list[int]]:
        """(its live part, all group ids, the last to be removed first), by removals down to so many."""
        live = _Live(layer)
        return live, live.ranking(self._order(live, live.n - smallest))

    def _order(self, live: _Live, picks: int) -> list[int]:
        """The first `picks` live groups to remove, in order."""
        if picks <= 0:
            return []
        hessian, weight, size = live.hessian, live.weight, live.size
        if self.search == "penalty":
            return (vanishing if self.penalty == "log" else vanished_set)(hessian, weight, size, picks, self.growth)
        price = self._price(live)
        if self.search == "score":
            v = removal.inverse(hessian) if self.score in removal.COMPENSATED else hessian  # else it is not read
            every = torch.arange(len(hessian), device=hessian.device)
            return price(weight, v, every).argsort(stable=True)[:picks].tolist()
        if self.score == "masked":
            return removal.remove_masked(hessian, weight, size, picks)
        least, most = self.step if size == 1 else (self.head_step, self.head_step)
        if size == most == 1 and self.score in removal.COMPENSATED and self.first_order == "none":
            return removal.remove_columns(hessian, weight, picks)
        return removal.remove_groups(hessian, weight, size, picks, price, lambda left: _at_once(left, least, most))

    def _price(self, live: _Live) -> removal.Price:
        reached = live.weight @ live.hessian if self.first_order != "none" else None  # R

        def price(w: Tensor, v: Tensor, left: Tensor) -> Tensor:
            if self.score == "wanda":
                return removal.by_group(w.abs().sum(0) * live.norm[left], live.size)
            if self.score == "masked":  # alone
                return removal.masked_error(live.hessian, w, live.size).diagonal()
            rise = removal.COMPENSATED[self.score](w, v, live.size)
            if reached is None:
                return rise
            slope = (w * reached[:, left]).sum(0).unflatten(0, (-1, live.size))  # ⟨w_j, R_j⟩
            return rise / 2 + (slope.sum(1) if self.first_order == "signed" else slope.abs().mean(1))

        return price


class _Live:
    """The part of a layer that something reaches, where the search takes place; its groups go by position.

    Positions run downwards, so that the first of several minima is the highest id.
    """

    def __init__(self, layer: LayerProblem) -> None:
        reached = layer.group_sum(layer.gram.diagonal()) > 0
        self.dead = (~reached).nonzero().flatten().tolist()
        self.groups = reached.nonzero().flatten().flip(0).tolist()
        self.n, self.size = len(self.groups), layer.group_size
        columns = layer.columns(self.groups)
        power = layer.gram.diagonal()[columns].double()
        self.norm = power.clamp_min(0).sqrt()  # √H_jj
        self.hessian = layer.hessian[columns][:, columns]
        self.weight = layer.target[:, columns] * (power > 0)  # dead columns are free

    def ranking(self, gone: Sequence[int]) -> list[int]:
        """All group ids, the last to be removed first; in id order before those that are gone."""
        out = [self.groups[p] for p in gone]
        return sorted(set(self.groups) - set(out)) + out[::-1] + self.dead

    def exchanged(self, ranking: Sequence[int], keeps: Sequence[int], most: int, tries: int) -> list[list[int]]:
        """The group ids kept at every count, by exchanges from the first of the ranking."""
        v = removal.inverse(self.hessian)
        sets = []
        for keep in keeps:
            first = set(ranking[:keep])
            gone = [p for p, g in enumerate(self.groups) if g not in first]
            if keep and gone:
                gone = exchanged(self.hessian, v, self.weight, self.size, gone, most, tries)
            sets.append(self.ranking(gone)[:keep])
        return sets


def _smallest(layer: LayerProblem, keeps: Sequence[int]) -> int:
    """The count down to which groups are removed in order: nothing is decided on the way to 0."""
    return min((keep for keep in keeps if keep > 0), default=layer.n_groups)


def _at_once(left: int, least: int, most: int) -> int:
    """How many groups go in a step: a sixteenth of what is left, rounded down to a power of two, within bounds."""
    return max(least, min(most, 1 << max((left // 16).bit_length() - 1, 0)))
