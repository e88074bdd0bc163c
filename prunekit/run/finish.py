"""Recovery steps: finishers work on the small model in turn, and what each has left is checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.errors import PluginError, WrongInput, first_line
from prunekit.layer.layouts import layout_of
from prunekit.models.opening import stored_as
from prunekit.plugins.finisher import Finisher, Workpiece
from prunekit.plugins.guard import instance, unchanged
from prunekit.plugins.registry import FINISHERS
from prunekit.run.stages import Run
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.system.checkpoints import Checkpoints


def finish_model(run: Run, small: PreTrainedModel, net: Supernet, plan: Allocation) -> list[dict[str, Any]]:
    """Let every finisher in turn work on the small model, in place.

    Args:
        run: whose finishers, text and checkpoints these are.
        small: the assembled model; afterwards in the values of the checkpoint's dtype.
        net: of which it was assembled.
        plan: kept groups, or weights per row, by site.

    Returns:
        What each reports, in order.

    Raises:
        PluginError: a finisher broke its contract.
    """
    dense, original, parts, said = run.dense, run.original.model, run.parts, list[dict[str, Any]]()
    if not parts.finishers:
        return said
    computed = next(small.parameters()).dtype
    stored_as(small, torch.promote_types(computed, torch.float32))  # small steps are lost in half precision
    kept = tuple(net.store.get(site, count).kept or () for site, count in zip(net.space.sites, plan, strict=True))
    for i, (spec, finisher) in enumerate(zip(parts.recipe.finishers, parts.finishers, strict=True)):
        before, tokens = shapes(small), run.draws.recovery if finisher.trains else run.draws.calibration
        assert tokens is not None  # drawn because somebody trains
        piece = Workpiece(
            small, original, dense.adapter, net.space.sites, plan, kept, tokens,
            parts.recipe.seed, run.progress, Checkpoints(run.place / f"finisher-{i}"), run.room,
            seconds_for(run, i), run.domains,
        )  # fmt: skip
        with run.clock("finish"):
            with unchanged(finisher, values=True, dense=original, tokens=tokens.ids):
                found = finisher.finish(piece)
            said.append({"name": spec["name"], **_report(finisher, found, spec)})
        check_finished(piece, finisher, before)
    stored_as(stored_as(small, dense.dtype), computed)  # what is measured is what will be saved
    return said


def seconds_for(run: Run, i: int) -> float | None:
    """Seconds that finisher `i` may take; None: as long as its options say."""
    trainers = sum(finisher.trains for finisher in run.parts.finishers[i:])
    if run.allotment is None or not run.parts.finishers[i].trains:
        return None
    return run.allotment.training_seconds(run.clock.seconds, trainers)


def _report(finisher: Finisher, found: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a finisher has to report, as it will be read; the options in it are some that it has."""
    who = type(finisher).__name__
    try:
        said = json.loads(json.dumps(instance(finisher, "what it reports", found, dict)))
    except (TypeError, ValueError, RecursionError) as error:
        raise PluginError(f"{who}: what it reports is not JSON: {first_line(error)}") from error
    if (options := said.get("options")) is not None:
        try:
            FINISHERS.build({**spec, **instance(finisher, "the options it reports", options, dict)})
        except WrongInput as error:
            raise PluginError(f"{who} reports options that it does not take: {error}") from error
    return said


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of all parameters, by name, tied ones under each."""
    return {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}


def check_finished(piece: Workpiece, finisher: Finisher, before: Mapping[str, torch.Size]) -> None:
    """Check that every shape is as before, but for biases where sites may get them and for linear maps beside MLPs, of
    as many parameters as were set aside; all is finite; zeros are as many.

    Args:
        piece: what the finisher has worked on.
        finisher: who has.
        before: the shapes of the model's parameters before it did.

    Raises:
        PluginError: says what is not.
    """
    who, after = type(finisher).__name__, shapes(piece.model)
    sites = [site for site, groups in zip(piece.sites, piece.kept, strict=True) if groups and finisher.adds_biases]
    may, beside = {f"{site.name}.bias" for site in sites}, _beside(piece)
    may |= beside.keys()
    if (more := sum(beside.values())) > (most := finisher.reserved(piece.sites)):
        raise PluginError(f"{who} put {more:,} parameters beside MLPs; {most:,} were set aside")
    for name in sorted(before.keys() | after.keys()):
        there, now = before.get(name), after.get(name)
        if there != now and not (there is None and name in may):
            raise PluginError(f"{who} changed {name} from {_shape(there)} to {_shape(now)}; every shape must stay")
    for name, value in piece.model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise PluginError(f"{who} left values in {name} that are not finite")
    blocks = piece.adapter.blocks(piece.model)
    for site, count in zip(piece.sites, piece.plan, strict=True):
        if site.form.shrinks:
            continue  # every shape was looked at
        if over := layout_of(site).overflow(site, count, piece.adapter.linear(blocks[site.block], site).weight):
            raise PluginError(f"{who} left {over} of {site.name}")


def _beside(piece: Workpiece) -> dict[str, int]:
    """The parameters of linear maps beside sub-layers, by name."""
    adapter, found = piece.adapter, dict[str, int]()
    for site, block in ((site, adapter.blocks(piece.model)[site.block]) for site in piece.sites):
        if (patch := adapter.patch(block, site)) is not None:
            path = f"{adapter.layers}.{site.block}.{adapter.holder(site)}.patch"
            found |= {f"{path}.{name}": p.numel() for name, p in patch.named_parameters()}
    return found


def _shape(size: torch.Size | None) -> str:
    return "nothing" if size is None else str(tuple(size))
