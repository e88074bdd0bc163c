"""The first step of a recipe that prunes experts and neurons inside: the dense model without whole experts, which is
then pruned."""

from __future__ import annotations

from dataclasses import replace

from prunekit.export.hf import to_transformers
from prunekit.models.opening import fingerprint
from prunekit.run.spaces import expert_spaces
from prunekit.run.stages import Run


def without_experts(run: Run) -> Run:
    """Take as many whole experts out of a run's model as the recipe's share of the budget says.

    The pruner of the recipe chooses them, in one calibration pass through the dense model.

    Args:
        run: of a recipe with both; it has the space of what is left.

    Returns:
        The run with the model that is left, of a class of transformers or of ours, in the place of the dense one.

    Raises:
        WrongInput: as `expert_spaces`.
    """
    parts, dense = run.parts, run.dense
    first, _ = expert_spaces(parts, dense.model, dense.adapter, dense.dtype)
    plan = tuple(kept for (kept,) in first.ladders)
    recipe = parts.recipe.model_copy(update={"experts": "whole", "carry": "dense"})
    before = replace(run, parts=replace(parts, recipe=recipe), whole=first)
    net = before.calibrate(first, plan, "experts", run.clock, search=None, priced=False)
    model = to_transformers(net.assemble(plan), dense.adapter)
    there = [(site.n_groups, kept) for site, kept in zip(first.sites, plan, strict=True) if site.kind == "experts"]
    run.progress.say(f"{sum(kept for _, kept in there):,} of {sum(of for of, _ in there):,} experts stay")
    return replace(run, dense=replace(dense, model=model, fingerprint=fingerprint(model), converted={}), wide=dense)
