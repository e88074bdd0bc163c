"""What a recipe may remove from a model, and under which budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.calibration.statistics import statistics_of
from prunekit.errors import WrongInput
from prunekit.layer.layouts import layout_of
from prunekit.models import paging
from prunekit.models.modules import hollow
from prunekit.models.width import check_narrow, narrow_shape, widths
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.metric import MeasuredMetric
from prunekit.recipe.resolve import Parts
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.space.sites import Kind, Site


def sparing(sites: Sequence[Site], blocks: int, first: int, last: int, kinds: Sequence[Kind] = ()) -> tuple[Site, ...]:
    """The sites, those of the `first` and the `last` of so many blocks and of some `kinds` spared.

    Raises:
        WrongInput: that is all of them.
    """
    if (first or last) and not any(first <= site.block < blocks - last for site in sites):
        raise WrongInput(
            f"spare: {first} first and {last} last of {blocks} blocks leave none to prune; spare fewer of them"
        )
    spared = [site.kind in kinds or not first <= site.block < blocks - last for site in sites]
    if all(spared):
        there = ", ".join(sorted({site.kind for site in sites}))
        raise WrongInput(f"spare.kinds: {', '.join(kinds)} leave nothing to prune, there is {there}; spare fewer kinds")
    return tuple(replace(site, spared=whole) for site, whole in zip(sites, spared, strict=True))


def in_multiples(sites: Sequence[Site], of: int) -> tuple[Site, ...]:
    """The sites, neurons kept in multiples of a number, all of them, or none.

    Raises:
        WrongInput: no MLP has so many.
    """
    most = max((site.n_groups * site.tile for site in sites if site.kind == "mlp"), default=0)
    if of > 1 and of >= most:
        raise WrongInput(f"multiple_of={of:,}, and the MLPs have at most {most:,} neurons; choose a smaller one")

    def multiple(site: Site) -> Site:
        each = of // math.gcd(of, site.tile)  # groups
        return replace(site, multiple=each, minimum=min(site.n_groups, -(-site.minimum // each) * each))

    return tuple(multiple(site) if site.kind == "mlp" else site for site in sites)


def check_sites(parts: Parts, sites: Sequence[Site]) -> None:
    """Refuse what does not reach the experts of a model, where it has any.

    Args:
        parts: of the recipe.
        sites: of the model.

    Raises:
        WrongInput: a recovery step, a learner, a metric or a statistic that asks for more than the sum over experts, or
            than the neurons of each.
    """
    recipe, instead = parts.recipe, "; leave it away for a mixture of experts"
    neurons = any(site.experts for site in sites)
    if not neurons and recipe.inside == "neurons" and parts.form.coupled:
        raise WrongInput(f"experts: {recipe.experts} is of a mixture of experts, and the model has none; leave it away")
    if not neurons and not any(site.kind == "experts" for site in sites):
        return
    if recipe.finishers:
        names = ", ".join(spec["name"] for spec in recipe.finishers)
        raise WrongInput(f"recovery step {names} does not reach experts yet{instead}")
    if parts.learner is not None:
        raise WrongInput("a learner cannot keep as many experts as a token selects yet; choose an allocator")
    if isinstance(parts.metric, MeasuredMetric):
        raise WrongInput("times of layers without experts cannot be measured; choose metric parameters or bytes")
    looking = [each.name for each in statistics_of(parts.needs) if "producers" in each.sees]
    looking += [need for need in ("gradient", "sub-layer") if need in parts.needs]
    looking += ["producers"] if neurons and "producers" in parts.needs else []
    if neurons and (parts.signals or "scores" in parts.allocator.needs):
        raise WrongInput(
            "the allocator reads one number of a whole layer, or a score of each of its groups, which neurons of "
            "experts have not yet; choose another allocator, such as table or uniform"
        )
    if looking:
        raise WrongInput(
            f"the statistic {looking[0]} is not taken of single experts yet; choose another pruner or signal, such as "
            "reap, obs or wanda"
        )


def whole_space(parts: Parts, model: PreTrainedModel, adapter: ModelAdapter, dtype: torch.dtype) -> Space:
    """Find every count of every site of a model, under the recipe's budget.

    The budget of single weights is a share of the weights of the linear maps, as in the literature; with of=model,
    of all parameters. Spared blocks count in it, so that the others lose more; a pattern is that of the others.

    Args:
        parts: of the recipe; of its family, of one member.
        model: with weights or without: only shapes are read.
        adapter: of the model's family.
        dtype: of the checkpoint, for metric bytes.

    Raises:
        WrongInput: there is nothing to remove, or the budget cannot be met.
    """
    if len(parts.shares) > 1:
        return share_spaces(parts, model, adapter, dtype)[0].space
    if parts.width is not None:
        return narrow_space(parts, model, adapter, dtype)[1]
    if parts.recipe.experts == "both" and parts.form.coupled:
        return expert_spaces(parts, model, adapter, dtype)[1]
    recipe, form = parts.recipe, parts.form
    sites, outside = _counted(parts, model, adapter)
    freed = sum(site.parameters(site.n_groups) for site in sites)
    kept = float(1 - Fraction(str(recipe.sparsity)))
    own = form.kept_share
    if own is not None:  # of what is not spared
        whole = sum(site.parameters(site.n_groups) for site in sites if site.spared)
        own = (whole + own * (freed - whole)) / freed
    budget = Budget.keeping(
        kept if own is None else own, sites,
        metric=parts.metric.for_checkpoint(dtype.itemsize), outside=outside, apart=recipe.apart,
    )  # fmt: skip
    if added := sum(finisher.reserved(sites) for finisher in parts.finishers):
        metric = budget.metric
        units = metric.outside(sites, outside + added) - metric.outside(sites, outside)
        budget = budget.setting_aside(units, sites, "mlp")
    if any(finisher.adds_biases for finisher in parts.finishers):
        sites = tuple(adapter.with_bias(model, site) for site in sites)  # what is pruned pays for them
    return Space.whole(sites, budget)


def narrow_space(parts: Parts, model: PreTrainedModel, adapter: ModelAdapter, dtype: torch.dtype) -> tuple[int, Space]:
    """Find the residual width, and every count of every site of a model that is so wide, under the recipe's budget.

    The price of all is straight in the width, yet is counted: in the shapes of a model of every width that is asked.
    The width is the largest that frees its share of what the budget asks for; the counts then make up what is left of
    it, exactly, or, where it is all, nothing.

    Args:
        parts: of a recipe with a width.
        model: with weights or without: only shapes are read.
        adapter: of the model's family.
        dtype: of the checkpoint, for metric bytes.

    Returns:
        (the width in channels, the space).

    Raises:
        WrongInput: the family's width stays as it is, or the budget cannot be met.
    """
    recipe, narrow = parts.recipe, parts.width
    assert narrow is not None
    family, metric = check_narrow(model, adapter), parts.metric.for_checkpoint(dtype.itemsize)
    there = widths(model, family, narrow.step)

    @cache
    def counted(width: int | None) -> tuple[tuple[Site, ...], int]:
        """The sites, and the price of what is outside them; None: of the model as it is."""
        shape = model if width is None else narrow_shape(model, family, width, rotated=narrow.turns)
        sites, outside = _counted(parts, shape, family)
        return sites, metric.outside(sites, outside)

    def price(width: int | None) -> int:
        sites, outside = counted(width)
        return outside + sum(metric.price(site, site.n_groups) for site in sites)

    dense, gone = price(None), Fraction(str(recipe.sparsity))
    limit = math.floor(dense * (1 - gone))
    most = dense - Fraction(str(narrow.share)) * (dense - limit)  # that it may leave
    fitting = bisect_right(there, most, key=price)
    if not fitting:
        raise WrongInput(
            f"sparsity {recipe.sparsity:g} of {metric.unit} cannot be met by the residual width, which is at least "
            f"{there[0]} here and then leaves {price(there[0]):,} of {dense:,}; lower width.share or width.step, or "
            "ask for less"
        )
    width = there[fitting - 1]
    sites, outside = counted(width)
    least = outside + sum(metric.price(site, site.least) for site in sites)
    if least > limit:
        raise WrongInput(metric.unreachable(1 - gone, least, dense))
    budget = Budget(limit - outside, metric, outside=outside, dense=dense)
    return width, Space.whole(sites, budget)


@dataclass(frozen=True)
class Shared:
    """One of several shares of what is to go that the residual width may take."""

    share: float  # 0: the width stays as it is
    width: int  # channels that stay
    space: Space  # what groups of a model that is so wide make up


def share_spaces(parts: Parts, model: PreTrainedModel, adapter: ModelAdapter, dtype: torch.dtype) -> list[Shared]:
    """Find what is tried of a recipe that names several shares of the width: every width once.

    Widths come in steps, so that two shares may ask for the same one, of which the lower stands for both. Of shares
    that nobody has named (`auto`), those are left out that the width, or the groups behind it, cannot meet.

    Args:
        parts: of a recipe with several shares.
        model: with weights or without: only shapes are read.
        adapter: of the model's family.
        dtype: of the checkpoint, for metric bytes.

    Returns:
        By ascending share; the budgets of all are the same one of the dense model.

    Raises:
        WrongInput: as `narrow_space`.
    """
    assert parts.width is not None
    check_narrow(model, adapter)
    found, own = dict[int, Shared](), int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator, union-attr, index]
    for share in parts.shares:
        one = parts.with_share(share)
        try:
            width, space = (own, whole_space(one, model, adapter, dtype)) if not share else narrow_space(
                one, model, adapter, dtype
            )  # fmt: skip
        except WrongInput:
            if parts.width.share != "auto" or (share == parts.shares[-1] and not found):
                raise
            continue
        found.setdefault(width, Shared(share, width, space))
    return list(found.values())


def expert_spaces(
    parts: Parts, model: PreTrainedModel, adapter: ModelAdapter, dtype: torch.dtype
) -> tuple[Space, Space]:
    """Find how many whole experts go first, and every count of every site of the model that is left, under the recipe's
    budget.

    What is left of a layer is a product, experts times neurons of each, and a budget is a sum over sites. So the number
    of experts is fixed first: as many go from every layer as fit into their share of what the budget asks for. The
    shapes of the model without them then have prices that add up, and their counts make up what is left of the budget,
    exactly.

    Args:
        parts: of a recipe with both.
        model: with weights or without: only shapes are read.
        adapter: of the model's family.
        dtype: of the checkpoint, for metric bytes.

    Returns:
        (the space of the first step, whose ladders have one rung each; that of the second).

    Raises:
        WrongInput: there are no experts, no whole one fits into the share, or the budget cannot be met.
    """
    recipe, metric = parts.recipe, parts.metric.for_checkpoint(dtype.itemsize)
    whole = replace(parts, recipe=recipe.model_copy(update={"experts": "whole"}))

    def price(sites: Sequence[Site]) -> int:
        return sum(metric.price(site, site.n_groups) for site in sites)

    before, outside = _counted(parts, model, adapter)
    dense, gone = metric.outside(before, outside) + price(before), Fraction(str(recipe.sparsity))
    limit = math.floor(dense * (1 - gone))
    sites, _ = _counted(whole, model, adapter)
    most = Fraction(str(recipe.experts_share)) * (dense - limit)

    def kept(site: Site, fewer: int) -> int:
        return max(site.least, site.n_groups - fewer) if site.kind == "experts" else site.n_groups

    def freed(fewer: int) -> int:
        return sum(
            metric.price(site, site.n_groups) - metric.price(site, kept(site, fewer))
            for site in sites if site.kind == "experts"
        )  # fmt: skip

    there = max(site.n_groups for site in sites if site.kind == "experts")
    fewer = bisect_right(range(1, there), most, key=freed)
    if not freed(fewer):
        raise WrongInput(
            f"experts_share {recipe.experts_share:g} of what sparsity {recipe.sparsity:g} asks for is {int(most):,} of "
            f"{dense:,} {metric.unit}, and one expert of every layer that may lose one has {freed(1):,}; ask for more, "
            "or choose experts: neurons"
        )
    plan = tuple(kept(site, fewer) for site in sites)
    first = Space(
        sites, tuple((count,) for count in plan),
        Budget(sum(metric.price(site, count) for site, count in zip(sites, plan, strict=True)), metric),
    )  # fmt: skip
    shape = hollow(model)
    for site, count in zip(sites, plan, strict=True):
        if count < site.n_groups:
            stand_in = layout_of(site).stand_in(site, count, torch.ones(1, site.n_groups))
            adapter.remove(shape, site, stand_in)
    left, outside = _counted(parts, shape, adapter)
    beside = metric.outside(left, outside)
    if (least := beside + sum(metric.price(site, site.least) for site in left)) > limit:
        raise WrongInput(metric.unreachable(1 - gone, least, dense))
    return first, Space.whole(left, Budget(limit - beside, metric, outside=beside, dense=dense))


def _counted(parts: Parts, model: nn.Module, adapter: ModelAdapter) -> tuple[tuple[Site, ...], int]:
    """The sites of a model, and the parameters that count and are of none of them."""
    recipe, form = parts.recipe, parts.form
    with paging.shapes_of(model):
        sites = adapter.sites_of(model, form, recipe.heads, recipe.inside)
    if not sites:
        raise WrongInput("the model has no site left to prune")
    check_sites(parts, sites)
    blocks = adapter.blocks(model)
    depth = len(blocks)
    if there := [site.name for site in sites if adapter.patch(blocks[site.block], site) is not None]:
        raise WrongInput(
            f"the MLP of {there[0]} has a linear map beside it, which a recovery step has added; prune the model that "
            "it was made from"
        )
    sites = in_multiples(sparing(sites, depth, *recipe.spare.of(depth), recipe.spare.kinds), recipe.multiple_of)
    base = model if recipe.of == "model" else adapter.blocks(model)
    freed = sum(site.parameters(site.n_groups) for site in sites)
    counts = recipe.of == "model" or form.shrinks
    return sites, sum(p.numel() for p in base.parameters()) - freed if counts else 0
