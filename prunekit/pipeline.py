"""The whole flow on one screen: tokens → moments → candidates → table → questions → allocation → small model."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit import report as reporting
from prunekit.build import build
from prunekit.calibration.tokens import Draws, TokenBatch, draw
from prunekit.checkpoint import Dense, fingerprint, opened, skeleton, stored_as
from prunekit.contracts import LocalPruner, Problem
from prunekit.errors import WrongInput
from prunekit.evaluate import perplexity
from prunekit.export import hf
from prunekit.export.verify import verify
from prunekit.ledger import Ledger
from prunekit.progress import Progress
from prunekit.recipe import Recipe
from prunekit.registry import ALLOCATORS, FINISHERS, OBJECTIVES, PRUNERS
from prunekit.search import converse
from prunekit.sites import Allocation, Budget, Site, Space
from prunekit.store import CandidateStore
from prunekit.supernet import Supernet
from prunekit.workplace import check_output, publish, workplace

PROBE = 1024  # tokens an export is verified on


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model and how it came to be."""

    model: nn.Module
    tokenizer: Any
    recipe: Recipe  # complete: what was resolved is written in
    report: dict[str, Any]
    ledger: str  # JSON lines
    directory: Path | None = None
    probe: tuple[torch.Tensor, torch.Tensor] | None = None  # (ids, float32 logits) that an export must reproduce

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write weights, config, tokenizer, recipe, report, ledger and card; verified in a fresh process, then renamed.

        Raises:
            WrongInput: the directory holds something and may not be overwritten.
        """
        target = Path(directory)
        check_output(target, overwrite=overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.with_name(f".{target.name}.writing")
        shutil.rmtree(folder, ignore_errors=True)
        write_result(self, folder)
        publish(folder, target)
        return target


def prune(
    recipe: Recipe,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    output: Path | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> Result:
    """Prune after a recipe. The model is `recipe.model`, or one in memory with its tokenizer.

    Everything the user may have got wrong is refused before any long work.

    Raises:
        WrongInput: says what was asked, what there is and what to do.
    """
    progress, clock = progress or Progress(), Clock()
    recipe = recipe.checked()
    pruner, allocator = PRUNERS.build(recipe.pruner), ALLOCATORS.build(recipe.allocator)
    objective = OBJECTIVES.build(recipe.objective)
    finishers = [FINISHERS.build(spec) for spec in recipe.finishers]
    if output is not None:
        check_output(output, overwrite=overwrite)
    whole_space(recipe, *skeleton(_source(recipe, model), trust_remote_code=recipe.trust_remote_code))

    with clock("open"):
        dense = opened(
            _source(recipe, model),
            tokenizer,
            device=recipe.device,
            dtype=recipe.dtype,
            trust_remote_code=recipe.trust_remote_code,
        )
        whole = whole_space(recipe, dense.model, dense.adapter)
        draws = draw(dense.tokenizer, recipe.data, progress, seed=recipe.seed, **_limits(dense.model))
        recipe = recipe.completed(model=dense.name, draws=draws)
    identity = {"recipe": recipe.digest, "model": fingerprint(dense.model)}
    with workplace(output, identity, resume=resume, overwrite=overwrite) as place:
        ledger = Ledger(place / "ledger.jsonl")
        space, centre, walk = allocator.first_space(whole), whole.uniform(), 0
        while True:  # coarse to fine: as long as the allocator wants finer ladders
            start = space.nearest(centre)
            with clock("prune"):
                net = supernet(recipe, dense, space, start, pruner, draws, place, walk, progress)
            problem = Problem(space, net.errors, start, recipe.seed, draws.search.n_tokens)
            ledger.note(reporting.space_record(walk, problem))
            with clock("search"):
                outcome = converse(
                    allocator, problem, net, objective, draws.search, ledger,
                    walk=walk, limit=recipe.search_budget, progress=progress, label=f"search {walk + 1}",
                )  # fmt: skip
            ledger.note({"kind": "choice", "walk": walk, "allocation": list(outcome.answer)})
            centre, finer = outcome.answer, allocator.next_space(space, outcome.answer)
            if finer is None:
                break
            space, walk = finer, walk + 1

        plan = whole.nearest(centre) if recipe.rebuild else centre  # spend what coarse rungs left over
        if recipe.rebuild and space.ladders != tuple((kept,) for kept in plan):
            with clock("prune"):
                final = whole.zoomed(plan, reach=0)
                net = supernet(recipe, dense, final, plan, pruner, draws, place, walk + 1, progress, "rebuild")
        with clock("finish"):
            small = net.assemble(plan)
            for finisher in finishers:
                finisher.finish(small, plan, draws.calibration)
        with clock("evaluate"):
            losses = {
                "objective": objective.loss(net, plan, draws.search) if not finishers else None,
                "dense": perplexity(dense.model, draws.evaluation).as_dict(),
                "pruned": perplexity(small, draws.evaluation).as_dict(),
            }
        small = copy.deepcopy(small).cpu()  # a copy: it shares tensors with the dense model
        probe = probed(stored_as(small, dense.dtype), draws.evaluation)
        exported = hf.to_transformers(stored_as(small, dense.dtype), dense.adapter)
        document = reporting.report(recipe, dense, whole, net, plan, exported, draws, losses, ledger, clock.seconds)
        ledger_text = ledger.path.read_text() if ledger.path.exists() else ""
        result = Result(
            exported, dense.tokenizer, recipe, document, ledger_text, output, probe
        )
        if output is not None:
            with clock("save"):
                shutil.rmtree(place / "result", ignore_errors=True)
                write_result(result, place / "result")
                publish(place / "result", output)
    return result


def whole_space(recipe: Recipe, model: nn.Module, adapter: Any) -> Space:
    """Every count of every site of the model, under the recipe's budget."""
    sites: tuple[Site, ...] = adapter.sites(model, heads=recipe.heads)
    if not sites:
        raise WrongInput("the model has no site left to prune")
    base = model if recipe.of == "model" else adapter.blocks(model)
    total = sum(p.numel() for p in base.parameters())
    outside = total - sum(site.parameters(site.n_groups) for site in sites)
    item = next(model.parameters()).element_size()
    budget = Budget.keeping(
        1 - recipe.sparsity, sites,
        metric=recipe.metric, bytes_per_parameter=item, outside=outside, apart=recipe.apart,
    )  # fmt: skip
    return Space.whole(sites, budget)


def supernet(
    recipe: Recipe,
    dense: Dense,
    space: Space,
    centre: Allocation,
    pruner: LocalPruner,
    draws: Draws,
    place: Path,
    walk: int,
    progress: Progress,
    label: str = "prune",
) -> Supernet:
    """Walk the blocks, or go on with a walk that was interrupted, or read one that was finished."""
    key = {"ladders": [list(ladder) for ladder in space.ladders], "centre": list(centre)}
    store = CandidateStore(place / f"walk-{walk}", key)
    errors = build(
        dense.model, dense.adapter, space, centre, pruner, draws.calibration, store,
        carry=recipe.carry, damping=recipe.damping, dtype=dense.dtype, progress=progress, label=f"{label} {walk + 1}",
    )  # fmt: skip
    return Supernet(dense.model, dense.adapter, space, errors, store)


def write_result(result: Result, folder: Path) -> None:
    """All files of a result; the export is verified in a fresh process before anyone can see it."""
    hf.save(result.model, folder, result.tokenizer, code=result.recipe.code)
    (folder / "recipe.yaml").write_text(result.recipe.to_yaml())
    (folder / "ledger.jsonl").write_text(result.ledger)
    reporting.write(result.report, result.recipe, folder)
    if result.recipe.verify and result.probe is not None:
        verify(folder, *result.probe, reporting.count(result.model))


@torch.no_grad()
def probed(model: nn.Module, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A few windows and the float32 logits of the model, whose parameters are float32 afterwards."""
    ids = tokens.first(PROBE).ids
    return ids, stored_as(model, torch.float32)(ids, use_cache=False).logits


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun


def _source(recipe: Recipe, model: nn.Module | None) -> str | nn.Module:
    if model is not None:
        return model
    if recipe.model is None:
        raise WrongInput("no model was given; name a folder or a hub id, or pass a model in memory")
    return recipe.model


def _limits(model: Any) -> dict[str, int]:
    return {
        "max_seqlen": int(getattr(model.config, "max_position_embeddings", 2048)),
        "vocab_size": int(model.get_input_embeddings().weight.shape[0]),
    }
