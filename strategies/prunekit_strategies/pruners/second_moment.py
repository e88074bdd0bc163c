"""Greedy Output Approximation: drop groups by the second moments of their outputs, and refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prunekit import LayerProblem, check_choices
from prunekit_strategies.pruners.ranking import Ranking


@dataclass(frozen=True)
class SecondMoment(Ranking):
    """Keep the groups whose outputs are large, or unlike the others'; least-squares weights on what stays.

        E_ab  = E⟨W_:a x_a, W_:b x_b⟩ = tr(W_:a H_ab W_:bᵀ)     (n_groups, n_groups)                (1)
        energy       u_g = E_gg; for a neuron ‖w_j‖² E[x_j²], the exact error of removing it alone   (2)
        likeness     sim_ab = E_ab / √(E_aa E_bb); of the two most alike drop that of less energy    (3)

    Source: Greedy Output Approximation (arXiv 2407.19126): (2) for neurons, (3) for heads, then least squares.
    Ours: (1) is read off the second moments, so no tokens are met again; heads rank by (2) unless (3) is asked
    for, because likeness alone drops a loud head before a silent one. Groups without output go first. On a tie the
    lower id stays.
    """

    heads: Literal["energy", "likeness"] = "energy"  # for groups of several columns; neurons go by energy
    refit: bool = True  # False: weights as they are

    def __post_init__(self) -> None:
        check_choices(self)

    def ranking(self, layer: LayerProblem) -> list[int]:
        if self.heads == "likeness" and layer.group_size > 1:
            return least_alike(_products(layer))
        return super().ranking(layer)

    def scores(self, layer: LayerProblem) -> Float[Tensor, " n_groups"]:
        """Mean squared output of each group alone, E_gg."""
        if layer.group_size > 1:
            return _products(layer).diagonal().clamp_min(0)
        return layer.weight.double().square().sum(0) * layer.gram.diagonal().double()  # (2)


def least_alike(products: Float[Tensor, "n n"]) -> list[int]:
    """All ids, the first to be dropped last: (3), until one is left."""
    energy = products.diagonal()
    scale = energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt()
    alike = products / scale / scale[:, None]
    alike.fill_diagonal_(-torch.inf)
    silent = [g for g in range(len(energy)) if energy[g] <= 0]
    gone = silent[::-1]
    alike[silent], alike[:, silent] = -torch.inf, -torch.inf
    for _ in range(len(energy) - len(silent) - 1):
        a, b = divmod(int(alike.argmax()), len(energy))
        worse = min((a, b), key=lambda g: (float(energy[g]), -g))
        alike[worse], alike[:, worse] = -torch.inf, -torch.inf
        gone.append(worse)
    return [*sorted(set(range(len(energy))) - set(gone)), *reversed(gone)]


def _products(layer: LayerProblem) -> Float[Tensor, "n_groups n_groups"]:
    """E of (1), whose sums over the columns of two groups are those of (WᵀW) ∘ H."""
    weight = layer.weight.double()
    cells = (weight.T @ weight) * layer.gram.double()
    return cells.unflatten(1, (layer.n_groups, -1)).sum(2).unflatten(0, (layer.n_groups, -1)).sum(1)
