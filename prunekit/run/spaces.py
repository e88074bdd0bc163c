"""What a recipe may remove from a model, and under which budget."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import nn

from prunekit.errors import WrongInput
from prunekit.models import paging
from prunekit.plugins.adapter import ModelAdapter
from prunekit.recipe.resolve import Parts
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space


def whole_space(parts: Parts, model: nn.Module, adapter: ModelAdapter, dtype: torch.dtype) -> Space:
    """Find every count of every site of a model, under the recipe's budget.

    The budget of single weights is a share of the weights of the linear maps, as in the literature; with of=model,
    of all parameters.

    Args:
        parts: of the recipe; of its family, of one member.
        model: with weights or without: only shapes are read.
        adapter: of the model's family.
        dtype: of the checkpoint, for metric bytes.

    Raises:
        WrongInput: there is nothing to remove, or the budget cannot be met.
    """
    recipe, form = parts.recipe, parts.form
    with paging.shapes_of(model):
        sites = adapter.sites_of(model, form, recipe.heads)
    if not sites:
        raise WrongInput("the model has no site left to prune")
    base = model if recipe.of == "model" else adapter.blocks(model)
    freed = sum(site.parameters(site.n_groups) for site in sites)
    counts = recipe.of == "model" or form.shrinks
    outside = sum(p.numel() for p in base.parameters()) - freed if counts else 0
    kept = float(1 - Fraction(str(recipe.sparsity)))
    budget = Budget.keeping(
        kept if form.kept_share is None else form.kept_share, sites,
        metric=parts.metric.for_checkpoint(dtype.itemsize), outside=outside, apart=recipe.apart,
    )  # fmt: skip
    if any(finisher.adds_biases for finisher in parts.finishers):
        sites = tuple(adapter.with_bias(model, site) for site in sites)  # what is pruned pays for them
    return Space.whole(sites, budget)
