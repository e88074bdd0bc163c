"""Prune the U-Net of a pipeline in a folder: whole operators, by what their removal does to generated latents."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prunekit.errors import WrongInput
from prunekit.models.opening import resolved_device
from prunekit.plugins.allocator import Allocator, Problem
from prunekit.plugins.guard import instance
from prunekit.plugins.objective import Objective
from prunekit.plugins.registry import ALLOCATORS, OBJECTIVES
from prunekit.recipe.schema import Recipe
from prunekit.run.workplace import new_folder, workplace
from prunekit.search.conversation import Known, converse
from prunekit.search.ledger import Ledger
from prunekit.space.budgets import Budget
from prunekit.space.ladders import Space
from prunekit.space.sites import Allocation, Site
from prunekit.system.files import digest, read_json, write_bytes, write_json
from prunekit.system.progress import Progress, progress_for
from prunekit_strategies.diffusion.pipelines import (
    INDEX,
    Pipeline,
    copy_rest,
    make_conditions,
    open_pipeline,
    verify_written,
    weight_files,
)

if TYPE_CHECKING:
    from prunekit_strategies.diffusion.latents import Latents
    from prunekit_strategies.diffusion.unets import Operator

PRESET = "ld-pruner"
MOST_PASSES = 32  # of ever finer ladders, of which two rungs leave none


def prune_pipeline(
    folder: str | Path,
    output: str | Path,
    *,
    sparsity: float,
    allocator: str | Mapping[str, Any] | Allocator | None = None,
    objective: str | Mapping[str, Any] | Objective | None = None,
    samples: int = 32,
    steps: int = 20,
    guidance: float | None = None,
    prompts: Sequence[str] | None = None,
    size: int | None = None,
    chunk: int = 8,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    verify: bool = True,
    resume: bool = True,
    overwrite: bool = False,
    quiet: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Remove whole operators from the U-Net of a pipeline of diffusers. Needs the extra prunekit[diffusers].

    Operators are residual blocks, attention and feed-forward layers, each a site that is kept whole or not at all. With
    Z = z_1 … z_N the final latents of N noises, all values of one as a vector, and Z' those without an operator u:

        J(u) = ‖mean_i z_i - mean_i z'_i‖₂ + ‖sd_i z_i - sd_i z'_i‖₂                   (1)

    The operators of least J leave, one after the other, until the budget is met; what of the last ones still fits comes
    back. No other weight changes.

    Source: LD-Pruner (Castells et al., arXiv:2404.11936): the operators one by one, the change of the mean and of the
    spread of the latents, the sum as the score, the least scored first. Derived: which branches are operators, the
    mean and spread value by value over samples with Euclidean norms, and that a budget in parameters ends the removal.
    What is removed is never replaced by another operator, and nothing is fine-tuned afterwards.

    Args:
        folder: of a pipeline with a UNet2DConditionModel or UNet2DModel, as `save_pretrained` writes it.
        output: a new folder, for the whole pipeline.
        sparsity: share of the U-Net's parameters to remove.
        allocator: decides what leaves, one that asks and reads nothing else; None: that of the preset ld-pruner.
        objective: judges by hidden states, which are latents here; None: that of the preset ld-pruner.
        samples: latents to generate for every question.
        steps: of the pipeline's scheduler.
        guidance: classifier-free guidance; None: 7.5 with a text encoder. 1: none, at half the cost.
        prompts: for the pipeline's text encoder, used in turn; None: eight of ours. Without a text encoder conditions
            are random.
        size: height and width of a latent; None: what the U-Net's config says.
        chunk: samples that go through the U-Net together.
        seed: of noise and random conditions.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the computation; auto: that of the weights, float32 on a CPU where that is narrower.
        verify: whether the result is loaded in a fresh process and compared.
        resume: whether an interrupted run of the same call is continued.
        overwrite: whether an earlier result in `output` may be replaced.
        quiet: whether progress is not shown.
        progress: receives the progress instead of the terminal.

    Returns:
        What `report.json` of the result holds.

    Raises:
        WrongInput: what cannot be done, what there is instead and what to do; before any long work.
        PluginError: a plug-in broke its contract.
        NotVerified: what was written is not the same U-Net when it is loaded.

    Example:
        >>> from prunekit_strategies.diffusion import prune_pipeline
        >>> report = prune_pipeline("my-pipeline", "small", sparsity=0.2)  # doctest: +SKIP
    """
    started, source, place = time.monotonic(), Path(folder).expanduser(), Path(output)
    for name, number in (("samples", samples), ("steps", steps), ("chunk", chunk)):
        if number < 1:
            raise WrongInput(f"{name} is at least 1, not {number}")
    preset = Recipe.load(PRESET)
    assert preset.allocator is not None  # and no learner
    search = ALLOCATORS.build(preset.allocator if allocator is None else allocator)
    judge = OBJECTIVES.build(preset.objective if objective is None else objective)
    check_allocator(search)
    pipeline = open_pipeline(source, resolved_device(device), dtype)
    space = make_space(pipeline.operators, pipeline.parameters, sparsity)
    net = make_latents(
        pipeline, space, samples=samples, steps=steps, guidance=guidance, prompts=prompts, size=size, chunk=chunk,
        seed=seed,
    )  # fmt: skip
    check_objective(judge, net)
    search.ready()
    settings: dict[str, Any] = {
        "pipeline": str(source),
        "sparsity": sparsity,
        "allocator": ALLOCATORS.spec(search),
        "objective": OBJECTIVES.spec(judge),
        "samples": samples,
        "steps": steps,
        "guidance": net.conditions.guidance,
        "prompts": None if prompts is None else list(prompts),
        "size": list(net.noise.shape[2:]),
        "chunk": chunk,
        "seed": seed,
        "device": str(pipeline.device),
        "dtype": str(net.noise.dtype)[6:],
    }
    identity = settings | {"weights": {path.name: digest(path) for path in weight_files(source / "unet")}}
    told = progress or progress_for(quiet)
    with workplace(place, identity, resume=resume, overwrite=overwrite) as work:
        ledger = Ledger(work / "ledger.jsonl")
        answer, known = run_search(search, judge, net, ledger, seed, told)
        final = ledger.once({"kind": "result", "allocation": list(answer)}, lambda: net.loss(judge, answer, net.batch))
        gone = [op.name for op, kept in zip(pipeline.operators, answer, strict=True) if not kept]
        small = _smaller(pipeline, gone)
        report = make_report(pipeline, space, answer, known, float(final), settings, net.depth, ledger)
        with new_folder(place, overwrite=overwrite) as result:
            report["files left out"] = copy_rest(source, result)
            small.save_pretrained(result / "unet")
            index = read_json(source / INDEX) | {"unet": [type(small).__module__, type(small).__name__]}
            write_json(result / INDEX, index)
            if verify:
                verify_written(result, small, net)
            report["verified"] = verify
            report["seconds"] = round(time.monotonic() - started, 1)
            write_bytes(result / "ledger.jsonl", ledger.text().encode())
            write_json(result / "report.json", report)
    budget = report["parameters"]
    told.say(
        f"{len(gone)} of {len(answer)} operators removed: {budget['pruned']:,} of {budget['dense']:,} parameters stay, "
        f"at most {budget['limit']:,} were allowed"
    )
    return report


# -- the search -------------------------------------------------------------------------------------


def make_space(operators: Sequence[Operator], parameters: int, sparsity: float) -> Space:
    """Every operator as a site of 0 or all under one exact budget.

    Args:
        operators: of the U-Net.
        parameters: all of the U-Net.
        sparsity: share of them to remove.

    Raises:
        WrongInput: the share cannot be met; says which can.
    """
    if not 0 < sparsity < 1:
        raise WrongInput(f"sparsity is the share that is removed, more than 0 and less than 1, not {sparsity}")
    sites = [
        Site(op.name, op.block, "attention" if op.kind.endswith("attention") else "mlp", 1, 1, op.parameters)
        for op in operators
    ]
    outside = parameters - sum(site.params_per_group for site in sites)
    return Space.whole(sites, Budget.keeping(1 - Fraction(str(sparsity)), sites, outside=outside))


def make_latents(
    pipeline: Pipeline,
    space: Space,
    *,
    samples: int,
    steps: int,
    guidance: float | None,
    prompts: Sequence[str] | None,
    size: int | None,
    chunk: int,
    seed: int,
) -> Latents:
    """What answers questions: the U-Net in the dtype of the computation, seeded noise, and conditions.

    Raises:
        WrongInput: the U-Net says no size, or conditions cannot be made.
    """
    from prunekit_strategies.diffusion.latents import Latents, make_noise

    config = pipeline.unet.config
    found = size or config.get("sample_size")
    if found is None:
        raise WrongInput("the config of the U-Net has no sample_size; give size, the height and width of a latent")
    height, width = (found, found) if isinstance(found, int) else tuple(found)
    unet, as_computed = pipeline.unet, {"device": pipeline.device, "dtype": pipeline.dtype}
    if next(unet.parameters()).dtype != pipeline.dtype:  # the weights that are written are those that were read
        unet = type(unet).from_config(unet.config)
        unet.load_state_dict(pipeline.unet.state_dict())
    nn.Module.to(unet.eval(), **as_computed)
    given = make_conditions(pipeline, samples, guidance, prompts, seed)
    wanted, unwanted = (None if each is None else each.to(**as_computed) for each in (given.wanted, given.unwanted))
    noise = make_noise(samples, (config["in_channels"], height, width), seed).to(**as_computed)
    return Latents(
        unet, pipeline.scheduler, pipeline.operators, space, steps, noise,
        replace(given, wanted=wanted, unwanted=unwanted), chunk, seed,
    )  # fmt: skip


def check_allocator(allocator: Allocator) -> None:
    """Refuse, before any long work, an allocator that reads what a U-Net has not.

    Raises:
        WrongInput: says what.
    """
    wanted = sorted(allocator.needs) + (["signals of layers"] if allocator.signals else [])
    if wanted:
        raise WrongInput(
            f"{type(allocator).__name__} reads {' and '.join(wanted)}, which operators of a U-Net do not have; take an "
            "allocator that asks, such as drop, greedy or evolution"
        )


def check_objective(objective: Objective, net: Latents) -> None:
    """Refuse, before any long work, an objective that reads what a U-Net does not answer.

    Raises:
        WrongInput: says what it may read.
    """
    reads = objective.reads(net.depth)
    if not (reads.tokens and reads.depths) or reads.top or reads.nats or reads.by_source or objective.training(1 << 40):
        raise WrongInput(
            f"{type(objective).__name__} judges by more than hidden states, and a U-Net has latents alone; take "
            "latent-stats"
        )
    objective.check(net.batch)


def run_search(
    allocator: Allocator, objective: Objective, net: Latents, ledger: Ledger, seed: int, progress: Progress
) -> tuple[Allocation, Known]:
    """Hold the allocator's conversation.

    Returns:
        What is built, one rung per site, and all losses that were asked for.
    """
    whole, known = net.space, Known()
    centre, space, number = (
        whole.uniform(),
        instance(allocator, "its first space", allocator.first_space(whole), Space),
        0,
    )
    while number < MOST_PASSES:
        errors = tuple(tuple(0.0 if kept else 1.0 for kept in ladder) for ladder in space.ladders)
        problem = Problem(space, errors, space.nearest(centre), seed, net.batch.n_tokens)
        found = converse(
            allocator, problem, net, objective, net.batch, ledger, pass_number=number, known=known, progress=progress
        )
        centre, finer = found.answer, allocator.next_space(space, found.answer)
        if finer is None:
            break
        space, number = instance(allocator, "its next space", finer, Space), number + 1
    last = instance(allocator, "its last space", allocator.last_space(whole, centre), Space)
    return tuple(ladder[0] for ladder in last.ladders), known


# -- the result -------------------------------------------------------------------------------------


def _smaller(pipeline: Pipeline, gone: Sequence[str]) -> Any:
    from prunekit_strategies.diffusion import unets

    return unets.pruned(pipeline.unet, gone)


def make_report(
    pipeline: Pipeline,
    space: Space,
    answer: Allocation,
    known: Known,
    final: float,
    settings: Mapping[str, Any],
    steps: int,
    ledger: Ledger,
) -> dict[str, Any]:
    """Say what was asked, what was removed and what that has cost."""
    top = tuple(1 for _ in pipeline.operators)
    alone = {found: loss for (found, _), loss in known.items() if sum(found) == len(top) - 1}
    kept = space.cost(answer) + space.budget.outside
    return {
        "made by": {name: metadata.version(name) for name in ("prunekit", "diffusers", "transformers", "torch")}
        | {"python": platform.python_version()},
        "settings": dict(settings),
        "parameters": {
            "dense": pipeline.parameters,
            "limit": space.budget.limit + space.budget.outside,
            "pruned": kept,
            "sparsity": 1 - kept / pipeline.parameters,
        },
        "loss": final,
        "search": {
            "questions": ledger.questions,
            "latents": ledger.tokens,
            "steps of a latent": steps,
        },
        "operators": [
            {
                "name": op.name,
                "kind": op.kind,
                "parameters": op.parameters,
                "kept": bool(stays),
                "loss without it": alone.get((*top[:i], 0, *top[i + 1 :])),
            }
            for i, (op, stays) in enumerate(zip(pipeline.operators, answer, strict=True))
        ],
    }
