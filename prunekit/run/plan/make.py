"""A plan from a recipe and the skeleton of a model, before any work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.data.draws import amounts, window_of
from prunekit.models.opening import computing_dtype, every_device, limits, resolved_devices
from prunekit.models.width import check_narrow, narrow_shape
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.metric import MeasuredMetric
from prunekit.recipe.resolve import Parts
from prunekit.recipe.schema import Recipe
from prunekit.run.plan.count import Count, Member, Shape
from prunekit.run.plan.plan import Plan
from prunekit.run.plan.rehearsal import Rehearsal, between, list_passes, rehearsed
from prunekit.run.plan.trial import Trials
from prunekit.run.spaces import expert_spaces, narrow_space
from prunekit.run.workplace import written
from prunekit.search.conversation import Known
from prunekit.space.ladders import Space
from prunekit.space.sites import Site
from prunekit.system.memory import Shares, available
from prunekit.system.sizes import parse_size

COPIED = (".json", ".jinja", ".model", ".txt")  # suffixes of configs and tokenizers
RECORDS, RECORDS_OF_SITE = 32 << 10, 2 << 10  # bytes of reports, manifests and code: of a run 20 KiB, of a site 1 KiB
SPARE = 0.9  # of what is free on the machine; the rest is for others


def planned(
    parts: Parts,
    model: nn.Module,
    adapter: ModelAdapter,
    wholes: Sequence[Space],
    output: Path | None,
    asked: Sequence[float] | None = None,
    *,
    rehearse: bool = False,
    trials: Trials | None = None,
) -> Plan:
    """What a recipe will take for a model of which the skeleton is enough.

    `wholes`: the space of the recipe, or of every member of its family; `asked`: the sparsities of those that results
    are made of, None: of the recipe's. Only where it is asked for, searches are rehearsed and the pruner is tried, to
    say how long they take.

    Raises:
        WrongInput: the recipe's memory is no amount, or its metric cannot be measured on this model.
    """
    recipe = parts.recipe
    devices = resolved_devices(recipe.device)
    device, there = devices[0], _placed(recipe, model, adapter)
    stored = next(model.parameters()).dtype
    computed = computing_dtype(stored, recipe.dtype, device)
    seqlen = window_of(recipe.data, limits(model)["max_seqlen"])
    tokens = amounts(recipe.data, seqlen, parts.amounts)
    limit_asked = parse_size(recipe.memory)
    limit = round(_free(devices, there) * SPARE) if limit_asked is None else limit_asked - _taken(device)
    free_disk = place = None
    if output is not None:
        place = next(p for p in (output.resolve(), *output.resolve().parents) if p.is_dir())
        free_disk = shutil.disk_usage(place).free + written(output)  # which is gone on with, or discarded
    allocator, known = parts.allocator, dict[int, Known]()
    free = not parts.searches(1)

    def training(count: int) -> int:
        learnt = min(parts.objective.training(count), tokens["recovery"])
        return 3 * max(1, learnt // seqlen) * seqlen if learnt else 0

    def searched(number: int, space: Space) -> Rehearsal:
        if free or not rehearse:
            return Rehearsal(0, 0, 0) if free else Rehearsal()
        learnt = known.setdefault(number, {})
        question = (allocator, space, tokens["search"], seqlen, recipe.search_budget)
        return between(rehearsed(*question, learnt, training=training), *question, training=training)

    members = []
    for each, whole in zip(recipe.members, wholes, strict=True):
        *spaces, last = list_passes(allocator, whole)
        counted = [searched(number, space) for number, space in enumerate(spaces)]
        wanted = each.sparsity in (asked or [recipe.sparsity])
        members.append(Member(str(each.sparsity) if recipe.family else "", whole, spaces, counted, last, wanted))
    metric, measured, before, after = parts.metric, "", None, None
    shape = Shape(model, adapter, wholes[0].sites, stored, computed)
    if isinstance(metric, MeasuredMetric):
        whole_model: Any = model
        measured, after = metric.unit, metric.runs_after(whole_model)
        before = metric.runs_before(whole_model, shape.sites) if metric.prices is None else None
    records = _records(recipe, shape.sites, sum(member.wanted for member in members))
    narrowed, first = _narrowed(parts, model, adapter, stored), None
    if recipe.experts == "both":
        first, _ = expert_spaces(parts, cast(PreTrainedModel, model), adapter, stored)
        gone = sum(
            s.parameters(s.n_groups) - s.parameters(k) for s, (k,) in zip(first.sites, first.ladders, strict=True)
        )
        narrowed = shape.parameters(model) - gone
    # each works on a layer where the model fits all of them, and those of the host have one memory
    together = 0 if len(devices) == 1 else len(devices) if device.type == "cpu" else 1
    count = Count(
        parts, shape, tokens, seqlen, members, before, after, records, trials, together, narrowed, first, device
    )

    def of(shares: Shares) -> Plan:
        stages = tuple(count.stages(shares))
        return Plan(
            stages, limit, free_disk, shares, count.resident, count.block, device, computed, place, count.forward,
            measured, tuple(devices),
        )  # fmt: skip

    plan, tight = of(Shares()), of(Shares(blocks=0))
    # else it is in memory already, or so small that its blocks are a hundredth of what is needed
    can = next(model.parameters()).is_meta and tight.least < 0.99 * plan.least
    if not (can and not measured and plan.least > limit):
        return of(Shares.of(limit - plan.least, paged=False))
    devices = every_device(recipe.device)
    if limit_asked is None:
        limit = round(_free(devices, there) * SPARE)
    own = count.own(len(devices)) if len(devices) > 1 else None
    shares = Shares.of(limit - tight.least, paged=True, own=own)
    if device.type == "cuda":
        shares = replace(shares, host=round(available(torch.device("cpu")) * SPARE / 2))  # the rest is for tensors
    return of(shares)


def _records(recipe: Recipe, sites: Sequence[Site], results: int) -> int:
    """Bytes of the files without weights: those of the model's folder, which every result has too, and our own."""
    source = Path(recipe.model).expanduser() if recipe.model else None
    files = source.iterdir() if source is not None and source.is_dir() else ()
    copied = sum(file.stat().st_size for file in files if file.suffix in COPIED)
    return results * (copied + RECORDS + RECORDS_OF_SITE * len(sites))


def _narrowed(parts: Parts, model: nn.Module, adapter: ModelAdapter, stored: torch.dtype) -> int | None:
    """Parameters of the model with a narrower residual stream, its head counted where it is a matrix of its own."""
    if parts.width is None:
        return None
    whole = cast(PreTrainedModel, model)
    width, _ = narrow_space(parts, whole, adapter, stored)
    slim = narrow_shape(whole, check_narrow(whole, adapter), width, rotated=parts.width.turns)
    return sum(p.numel() for p in slim.parameters())


def _placed(recipe: Recipe, model: nn.Module, adapter: ModelAdapter) -> list[torch.device]:
    """The devices that a model in memory stays on, where it was loaded to several; else none."""
    found = [next(block.parameters()).device for block in adapter.blocks(model)]
    return found if recipe.device == "auto" and len({*found}) > 1 else []


def _free(devices: Sequence[torch.device], there: Sequence[torch.device]) -> int:
    """Bytes that are free on the fullest of the devices; on all that a model in memory is on, together."""
    return sum(map(available, {*there})) if there else min(map(available, devices))


def _taken(device: torch.device) -> int:
    """Bytes this process has already, on a machine that says so."""
    statm = Path("/proc/self/statm")
    if device.type == "cuda" or not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
