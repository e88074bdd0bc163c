"""The whole flow on one screen: tokens → moments → candidates → table → questions → allocation → small model."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.calibration.fill import build
from prunekit.calibration.gradients import Gradients
from prunekit.data.draws import Draws, draw
from prunekit.data.tokens import TokenBatch
from prunekit.errors import CannotGoOn, NotVerified, PluginError, WrongInput
from prunekit.export import hf
from prunekit.export.write import prove, write
from prunekit.layer.candidates import is_sparse
from prunekit.measure.perplexity import Perplexity, perplexity
from prunekit.models import paging
from prunekit.models.opening import load_tokenizer, loaded, opened, resolved_devices, skeleton, stored_as
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.allocator import Allocator, Problem
from prunekit.plugins.dense import Dense
from prunekit.plugins.engine import Opening, Team
from prunekit.plugins.exporter import Order, Probe, Product
from prunekit.plugins.finisher import Finisher, Workpiece
from prunekit.plugins.metric import MeasuredMetric
from prunekit.plugins.registry import (
    ALLOCATORS,
    ENGINES,
    EXPORTERS,
    FINISHERS,
    METRICS,
    OBJECTIVES,
    PRUNERS,
    signals_of,
)  # fmt: skip
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.report.card import write as write_report
from prunekit.run.plan import Plan, planned
from prunekit.run.workplace import check_output, left, publish, unfinished, workplace
from prunekit.search.conversation import Known, converse
from prunekit.search.ledger import Ledger
from prunekit.search.shared import SharedSupernet
from prunekit.search.store import CandidateStore
from prunekit.search.supernet import Supernet
from prunekit.search.teacher import Teacher
from prunekit.space.budgets import Budget
from prunekit.space.forms import Structure
from prunekit.space.ladders import Space
from prunekit.space.prices import FILE
from prunekit.space.sites import Allocation, Site
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.files import write_json
from prunekit.system.memory import Room, amount
from prunekit.system.progress import Progress

PROBE = 1024  # tokens an export is verified on
SECONDS = "seconds.json"  # beside the candidates: what their walk took


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model and how it came to be."""

    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe  # complete: what was resolved is written in
    report: dict[str, Any]
    ledger: str  # JSON lines
    directory: Path | None = None
    probe: tuple[torch.Tensor, torch.Tensor] | None = None  # (ids, float32 logits) that an export must reproduce
    blocks: int | None = None  # bytes of blocks to hold at once, of a model that does not fit memory; None: it does

    @classmethod
    def load(cls, directory: str | Path, *, blocks: int | None = None) -> Result:
        """A result that was saved, its model in the dtype of its file; paged where `blocks` are given."""
        folder = Path(directory)
        recipe, report = Recipe.load(folder), json.loads((folder / "report.json").read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(str(folder), recipe.trust_remote_code)
        ledger = (folder / "ledger.jsonl").read_text(encoding="utf-8")
        return cls(saved_model(folder, recipe, blocks), tokenizer, recipe, report, ledger, folder, None, blocks)

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


class Clock:
    """Seconds by stage: its own, and those of a clock that it shares with others."""

    def __init__(self, shared: Clock | None = None) -> None:
        self.own: dict[str, float] = {}
        self.shared = shared or self

    @property
    def seconds(self) -> dict[str, float]:
        """What it takes to come so far alone: shared ones are included."""
        both = dict(self.shared.own) if self.shared is not self else {}
        return both | {stage: spent + both.get(stage, 0.0) for stage, spent in self.own.items()}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - begun)

    def add(self, stage: str, seconds: float) -> None:
        """What a stage has cost; a walk that is only read counts as when it was walked."""
        self.own[stage] = self.own.get(stage, 0.0) + seconds


def prune(
    recipe: Recipe,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: Any = None,
    output: Path | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> Result:
    """Prune after a recipe. The model is `recipe.model`, or one in memory with its tokenizer.

    Everything the user may have got wrong is refused before any long work. A recipe that names its family is searched
    together with all of it, so that it comes out as it did there.

    Raises:
        WrongInput: says what was asked, what there is and what to do.
    """
    with begun(recipe, model, tokenizer, output, progress, resume=resume, overwrite=overwrite) as (place, runs):
        found = dict(zip(runs, searched(runs), strict=True))
        run = next(run for run in runs if run.recipe.sparsity == recipe.sparsity)
        result = run.result(*found[run], run.dense_perplexity(), output)
        if output is not None:
            shutil.rmtree(place / "result", ignore_errors=True)
            write_result(result, place / "result")
            publish(place / "result", output)
    if output is not None and paging.pager_of(result.model) is not None:  # what it was cut from is gone
        return replace(result, model=saved_model(output, result.recipe, result.blocks))
    return result


@contextmanager
def begun(
    recipe: Recipe,
    model: PreTrainedModel | None,
    tokenizer: Any,
    output: Path | None,
    progress: Progress | None,
    asked: Sequence[float] | None = None,
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[tuple[Path, list[Run]]]:
    """A folder to work in and a run for the recipe, or for every one of its family: checked, opened, text drawn.

    `asked` are the sparsities that a family makes results of; None: of the recipe's own, and no family is made.
    """
    recipe, progress, clock = recipe.checked(), progress or Progress(), Clock()
    source = recipe.model if model is None else model
    if source is None:
        raise WrongInput("no model was given; name a folder or a hub id, or pass a model in memory")
    if output is not None:
        files = [*recipe.data.names, *([source] if isinstance(source, str) else [])]
        check_output(output, overwrite=overwrite, sources=[f for f in files if Path(f).exists()])
    plan = foreseen(recipe, *skeleton(source, trust_remote_code=recipe.trust_remote_code), output, asked)
    plan.check()
    devices = devices_of(recipe, plan)
    if plan.paged:
        progress.say(f"the model does not fit {amount(plan.limit)} of memory: blocks are read when they are needed")
        if output is None:
            raise WrongInput("a model that does not fit memory needs a folder for the result; give output")
    if not (resume and output is not None and unfinished(output)):  # what goes on may have all it needs on record
        ALLOCATORS.build(recipe.allocator).ready()
    with clock("open"):
        dense = opened(
            source, tokenizer,
            device=str(devices[0]), dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code, shares=plan.shares,
        )  # fmt: skip
        draws = draw(dense.tokenizer, recipe.data, progress, seed=recipe.seed, **limits(dense.model))
        OBJECTIVES.build(recipe.objective).check(draws.search)
        recipe = recipe.completed(model=dense.name, draws=draws)
    identity = recipe.determining() | {"weights": dense.fingerprint, "versions": reporting.versions(recipe)}
    if asked is not None:
        identity["sparsity"] = list(asked)
    with clock("time"):
        past = left(output, identity) if resume and output is not None else None
        recipe = priced(recipe, dense, None if past is None else past / FILE, progress)
    spaces = [whole_space(member, dense.model, dense.adapter, dense.dtype) for member in recipe.members]
    engine, opening = ENGINES.build(recipe.engine), Opening(source, recipe.dtype, recipe.trust_remote_code)
    with (
        workplace(output, identity, resume=resume, overwrite=overwrite) as place,
        engine.team(dense, opening, devices) as team,
    ):
        write_prices(recipe, place)
        runs, teacher = list[Run](), Teacher(dense.shares, emptied(place / "teacher"))
        for member, whole in zip(recipe.members, spaces, strict=True):
            own = place / str(member.sparsity) if recipe.family else place
            own.mkdir(exist_ok=True)
            ledger = Ledger(own / "ledger.jsonl")
            runs.append(Run(
                member, dense, whole, draws, ledger, own, progress, Clock(clock), teacher, place, plan.limit, team,
            ))  # fmt: skip
        yield place, runs


def devices_of(recipe: Recipe, plan: Plan) -> list[torch.device]:
    """That a run may use; the dense model is opened on the first.

    Raises:
        WrongInput: there is no such device, or work is to be shared out on a model that is read block by block.
    """
    devices = resolved_devices(recipe.device)
    if plan.paged and (len(devices) > 1 or recipe.engine["name"] != "local"):
        raise WrongInput(
            f"device {recipe.device} and engine {recipe.engine['name']} share the work among copies of the model, and "
            f"it does not fit {amount(plan.limit)} of memory; give one device and engine local, or more --memory"
        )
    return devices


def foreseen(
    recipe: Recipe,
    shape: PreTrainedModel,
    adapter: ModelAdapter,
    output: Path | None,
    asked: Sequence[float] | None = None,
    *,
    rehearse: bool = False,
) -> Plan:
    """What a checked recipe will take, from the model's shapes alone; `asked` as of `begun`.

    As long as nothing was measured, another metric stands in for one that is.

    Raises:
        WrongInput: the budget cannot be met, a finisher or an exporter cannot do what is asked, or memory is no amount.
    """
    counted, metric = recipe, METRICS.build(recipe.metric_spec)
    if isinstance(metric, MeasuredMetric) and metric.prices is None:
        counted = recipe.with_metric(metric.stand_in()).model_copy(update={"of": "blocks"})
    spaces = [whole_space(member, shape, adapter, next(shape.parameters()).dtype) for member in counted.members]
    for spec in recipe.finishers:
        FINISHERS.build(spec).check(adapter)
    order = Order(adapter, Structure.parsed(recipe.structure).units, recipe.code)
    for spec in recipe.exporters:
        EXPORTERS.build(spec).check(order)
    return planned(recipe, shape, adapter, spaces, output, asked, rehearse=rehearse)


def searched(runs: Sequence[Run]) -> list[tuple[Supernet, Allocation]]:
    """What each run's allocator answered, and the network it was asked about.

    Coarse to fine, as long as an allocator wants finer ladders. The runs differ in their budgets alone: a walk along
    the rungs of all costs little more than along those of one, so every round is walked once; then each holds its own
    conversation on its own ladders, and what is known from another's is not judged again.
    """
    first, walk, found = runs[0], 0, dict[Run, tuple[Supernet, Allocation]]()
    allocator = ALLOCATORS.build(first.recipe.allocator)
    spaces = {run: allocator.first_space(run.whole) for run in runs}  # of those that still search
    centres = {run: run.whole.uniform() for run in runs}
    while spaces:
        starts = {run: space.nearest(centres[run]) for run, space in spaces.items()}
        every = next(iter(spaces.values())).joined(*spaces.values())
        middle = tuple(sorted(counts)[len(counts) // 2] for counts in zip(*starts.values(), strict=True))
        net = first.walked(every, middle, f"prune {walk + 1}", first.clock.shared, allocator)
        known: Known = {}
        centres = {run: run.asked(allocator, net, space, starts[run], walk, known) for run, space in spaces.items()}
        finer = {run: allocator.next_space(space, centres[run]) for run, space in spaces.items()}
        found |= {run: (net, centres[run]) for run, space in finer.items() if space is None}
        spaces = {run: space for run, space in finer.items() if space is not None}
        walk += 1
        net.rest()  # the next walk needs the room
    return [found[run] for run in runs]


def assembled(net: Supernet, plan: Allocation, recipe: Recipe) -> PreTrainedModel:
    """The small model, its tensors its own. Over a paged model it is paged, unless finishers will change it."""
    if paging.pager_of(net.model) is None or recipe.finishers:
        return paging.whole(net.assemble(plan))
    weight = next(net.model.parameters())
    return hf.paged(net, plan, weight.dtype, weight.device)


@dataclass(frozen=True, eq=False)
class Run:
    """What every stage of a run needs."""

    recipe: Recipe
    dense: Dense
    whole: Space
    draws: Draws
    ledger: Ledger
    place: Path  # what this run alone can use again
    progress: Progress
    clock: Clock
    teacher: Teacher  # of all runs over the model
    shelf: Path | None = None  # walks, which other runs over the model may share; None: at `place` too
    limit: int | None = None  # bytes of memory that it may take; None: any
    team: Team | None = None  # who shares the work; None: nobody

    @cached_property
    def room(self) -> Room:
        """For activations."""
        return Room(self.dense.shares.activations, emptied(self.place / "activations"))

    def blocks(self, parameters: int) -> int | None:
        """Bytes of blocks to hold at once, of a model of so many parameters; None: it fits whole, in float32."""
        return None if self.limit is None or 1.2 * 4 * parameters < self.limit else self.dense.shares.blocks

    def dense_perplexity(self) -> Perplexity:
        """Of the model as it was, on the evaluation text."""
        with self.clock.shared("evaluate"):
            return perplexity(self.dense.model, self.draws.evaluation)

    def asked(
        self, allocator: Allocator, net: Supernet, space: Space, start: Allocation, walk: int, known: Known
    ) -> Allocation:
        """The allocator's answer on some of the rungs of a walk; its whole conversation goes on record."""
        signals, scores = net.store.measured(space.sites, scores="scores" in allocator.needs)
        problem = Problem(
            space, net.table(space), start, self.recipe.seed, self.draws.search.n_tokens, signals, scores,
        )  # fmt: skip
        self.ledger.note(reporting.space_record(walk, problem))
        with self.clock("search"):
            answer = converse(
                allocator, problem, net, OBJECTIVES.build(self.recipe.objective), self.draws.search, self.ledger,
                walk=walk, limit=self.recipe.search_budget, known=known, progress=self.progress,
                label=self._called(f"search {walk + 1}"),
            ).answer  # fmt: skip
        self.ledger.note({"kind": "choice", "walk": walk, "allocation": list(answer)})
        return answer

    def rebuilt(self, net: Supernet, answer: Allocation) -> tuple[Supernet, Allocation]:
        """Pruned once more, around the answer."""
        if not self.recipe.rebuild:
            return net, answer
        final = ALLOCATORS.build(self.recipe.allocator).last_space(self.whole, answer)
        plan = tuple(kept for (kept,) in final.ladders)
        if final.ladders == net.space.ladders:
            return net, plan
        return self.walked(final, plan, self._called("rebuild"), self.clock), plan

    def result(self, net: Supernet, answer: Allocation, before: Perplexity, output: Path | None) -> Result:
        """The small model that the search has come to: rebuilt, finished, measured, as it will be exported."""
        recipe, dense, draws = self.recipe, self.dense, self.draws
        net, plan = self.rebuilt(net, answer)
        small = assembled(net, plan, recipe)
        raw = perplexity(small, draws.evaluation) if recipe.finishers else None
        said = self.finish(small, net, plan)
        with self.clock("evaluate"):
            after = perplexity(small, draws.evaluation)
            rise, error = after.above(before)
            losses = {
                "objective": OBJECTIVES.build(recipe.objective).loss(net, plan, draws.search),
                "dense": before.as_dict(),
                "pruned": after.as_dict(),
                "rise": {"nll": rise, "standard_error": error},  # paired by window
                "nll_by_source": reporting.by_source(draws.evaluation, before, after),
            } | ({} if raw is None else {"unfinished": raw.as_dict()})
        pace = self.paced(small, plan)
        if paging.pager_of(small) is None:
            probe = probed(stored_as(small.cpu(), dense.dtype), draws.evaluation)
            exported = hf.to_transformers(stored_as(small, dense.dtype), dense.adapter)
        else:
            paging.rest(small)
            cpu = torch.device("cpu")
            probe = probed(hf.paged(net, plan, torch.float32, cpu), draws.evaluation)
            exported = hf.paged(net, plan, dense.dtype, cpu)
        document = reporting.report(
            recipe, dense, draws, self.whole, net, plan, exported, losses=losses, finishers=said, pace=pace,
            search={"questions": self.ledger.questions, "token_forwards": self.ledger.tokens},
            seconds=self.clock.seconds, seconds_shared=self.clock.shared.own,
        )  # fmt: skip
        blocks = self.blocks(reporting.count(exported))
        return Result(exported, dense.tokenizer, recipe, document, self.ledger.text(), output, probe, blocks)

    def walked(
        self, space: Space, centre: Allocation, label: str, clock: Clock, allocator: Allocator | None = None
    ) -> Supernet:
        """Walk the blocks, or go on with a walk that was interrupted, or read one that was finished.

        What the allocator asks for is measured on the way.
        """
        dense, recipe, draws, shelf = self.dense, self.recipe, self.draws, self.shelf or self.place
        pruner, signals, scores = PRUNERS.build(recipe.pruner), (), False
        if allocator is not None:
            signals, scores = signals_of(allocator), "scores" in allocator.needs
        key = {  # whatever a walk over this model depends on: whoever has walked so before need not again
            "sites": [[site.name, site.n_groups] for site in space.sites],
            "ladders": [list(ladder) for ladder in space.ladders],
            "centre": list(centre) if recipe.carry == "centre" else None,
            "tokens": [[t.digest, *t.ids.shape] for t in (draws.calibration, draws.contrast) if t is not None],
            "measured": [*map(repr, signals), scores],
            **{name: getattr(recipe, name) for name in ("structure", "pruner", "carry", "damping")},
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        store, begun = CandidateStore(shelf / f"walk-{name}", key), time.perf_counter()
        new, gradients = any(site not in store for site in space.sites), None
        if new and any("gradient" in plugin.needs for plugin in (pruner, *signals)):
            # of the dense model: every walk reads the same
            gradients = Gradients.collected(
                dense.model, dense.adapter, draws.calibration,
                shelf / f"gradients-{draws.calibration.digest[:16]}", self.progress, self.room,
            )  # fmt: skip
        errors = build(
            dense.model, dense.adapter, space, centre, pruner, draws.calibration, store,
            signals=signals, scores=scores, carry=recipe.carry, damping=recipe.damping, dtype=dense.dtype,
            gradients=gradients, contrast=draws.contrast, room=self.room, team=self.team, progress=self.progress,
            label=label,
        )  # fmt: skip
        if new or not (store.directory / SECONDS).exists():
            write_json(store.directory / SECONDS, time.perf_counter() - begun)
        clock.add("prune", json.loads((store.directory / SECONDS).read_text()))
        net = Supernet(dense.model, dense.adapter, space, errors, store, dense.shares, self.teacher)
        return net if self.team is None else SharedSupernet(net, self.team)

    def finish(self, small: PreTrainedModel, net: Supernet, plan: Allocation) -> list[dict[str, Any]]:
        """Let every finisher in turn work on the small model, in place; what they report."""
        dense, computed, said = self.dense, next(small.parameters()).dtype, list[dict[str, Any]]()
        if not self.recipe.finishers:
            return said
        stored_as(small, torch.promote_types(computed, torch.float32))  # small steps are lost in half precision
        kept = tuple(net.store.get(site, count).kept or () for site, count in zip(net.space.sites, plan, strict=True))
        for i, spec in enumerate(self.recipe.finishers):
            before, finisher = shapes(small), FINISHERS.build(spec)
            piece = Workpiece(
                small, dense.model, dense.adapter, net.space.sites, plan, kept, self.draws.calibration,
                self.recipe.seed, self.progress, Checkpoints(self.place / f"finisher-{i}"), self.room,
            )  # fmt: skip
            with self.clock("finish"):
                said.append({"name": spec["name"]} | finisher.finish(piece))
            check_finished(piece, finisher, before)
        stored_as(stored_as(small, dense.dtype), computed)  # what is measured is what will be saved
        return said

    def paced(self, small: PreTrainedModel, plan: Allocation) -> dict[str, Any] | None:
        """What a measured metric promised, and what the model takes as it will be exported; None: nothing was."""
        budget = self.whole.budget
        if not isinstance(budget.metric, MeasuredMetric):
            return None
        with self.clock("time"):
            found = budget.metric.realised(
                self.dense.model, hf.to_transformers(small, self.dense.adapter),
                target=float(1 - Fraction(str(self.recipe.sparsity))),
                promised=(budget.outside + self.whole.cost(plan)) / budget.dense, progress=self.progress,
            )  # fmt: skip
        if not found["kept"]:
            self.progress.say(f"warning: {reporting.kept_promise(found)}")
        return dict(found)

    def _called(self, stage: str) -> str:
        """A stage that every member of a family has."""
        return f"{stage} for {self.recipe.sparsity}" if self.recipe.family else stage


def emptied(folder: Path) -> Path:
    """A folder for what is of no use to another run: what an interrupted one has left there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of all parameters, by name, tied ones under each."""
    return {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}


def check_finished(piece: Workpiece, finisher: Finisher, before: Mapping[str, torch.Size]) -> None:
    """Every shape is as before, but for biases where sites may get them; every weight is finite; zeros are as many.

    Raises:
        PluginError: says what is not.
    """
    who, after = type(finisher).__name__, shapes(piece.model)
    sites = [site for site, groups in zip(piece.sites, piece.kept, strict=True) if groups and finisher.adds_biases]
    may = {f"{site.name}.bias" for site in sites}
    for name in sorted(before.keys() | after.keys()):
        there, now = before.get(name), after.get(name)
        if there != now and not (there is None and name in may):
            raise PluginError(f"{who} changed {name} from {_shape(there)} to {_shape(now)}; every shape must stay")
    for name, value in piece.model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise PluginError(f"{who} left values in {name} that are not finite")
    blocks = piece.adapter.blocks(piece.model)
    for site, count in zip(piece.sites, piece.plan, strict=True):
        if site.kind == "linear":
            weight = piece.adapter.linear(blocks[site.block], site).weight
            if not is_sparse(weight, count, site.pattern):
                raise PluginError(f"{who} left more than {site.said(count)} weights per row of {site.name}")


def _shape(size: torch.Size | None) -> str:
    return "nothing" if size is None else str(tuple(size))


def whole_space(recipe: Recipe, model: nn.Module, adapter: ModelAdapter, dtype: torch.dtype) -> Space:
    """Every count of every site of the model, under the recipe's budget.

    The budget of single weights is a share of the weights of the linear maps, as in the literature; with of=model,
    of all parameters.
    """
    structure, kept = Structure.parsed(recipe.structure), float(1 - Fraction(str(recipe.sparsity)))
    sites: tuple[Site, ...]
    with paging.shapes_of(model):
        if structure.units == "groups":
            sites = adapter.sites(model, heads=recipe.heads)
        else:
            sites = adapter.linear_sites(model, structure)
    if not sites:
        raise WrongInput("the model has no site left to prune")
    base = model if recipe.of == "model" else adapter.blocks(model)
    freed = sum(site.parameters(site.n_groups) for site in sites)
    counts = recipe.of == "model" or structure.units == "groups"
    outside = sum(p.numel() for p in base.parameters()) - freed if counts else 0
    metric = METRICS.build(recipe.metric_spec).for_checkpoint(dtype.itemsize)
    budget = Budget.keeping(
        kept if structure.units != "n:m" else Fraction(structure.kept, structure.block), sites,
        metric=metric, outside=outside, apart=recipe.apart,
    )  # fmt: skip
    if any(FINISHERS.build(spec).adds_biases for spec in recipe.finishers):
        sites = tuple(adapter.with_bias(model, site) for site in sites)  # what is pruned pays for them
    return Space.whole(sites, budget)


def priced(recipe: Recipe, dense: Dense, past: Path | None, progress: Progress) -> Recipe:
    """The recipe with the prices its metric needs: its own, or those at `past`, or such as are measured now."""
    metric = METRICS.build(recipe.metric_spec)
    if not isinstance(metric, MeasuredMetric):
        return recipe
    structure, adapter = Structure.parsed(recipe.structure), dense.adapter
    groups = structure.units == "groups"
    sites = adapter.sites(dense.model, recipe.heads) if groups else adapter.linear_sites(dense.model, structure)
    return recipe.with_metric(metric.measured(dense, sites, past, progress))


def write_prices(recipe: Recipe, folder: Path) -> None:
    """The prices beside the recipe that names them."""
    if isinstance(prices := recipe.metric_spec.get("prices"), dict):
        write_json(folder / FILE, prices)


def saved_model(folder: Path, recipe: Recipe, blocks: int | None) -> PreTrainedModel:
    """The model of a result in the dtype of its file; paged where `blocks` are given, in bytes to hold at once."""
    trusted = recipe.trust_remote_code or recipe.code == "bundled"
    if blocks is None:
        return loaded(str(folder), dtype="auto", trust_remote_code=trusted)
    cpu = torch.device("cpu")
    return paging.opened(str(folder), lambda stored: stored, cpu, blocks, trust_remote_code=trusted)[0]


def write_result(result: Result, folder: Path) -> None:
    """All files of a result; what exporters have written is verified before anyone can see it."""
    exporters = [EXPORTERS.build(spec) for spec in result.recipe.exporters]
    write(exporters, Product(result.model, result.tokenizer, result.report, result.recipe.code), folder)
    write_prices(result.recipe, folder)
    (folder / "recipe.yaml").write_text(result.recipe.to_yaml())
    (folder / "ledger.jsonl").write_text(result.ledger)
    write_report(result.report, result.recipe, folder)
    if result.recipe.verify and result.probe is not None:
        try:
            paging.rest(result.model)
            prove(exporters, folder, Probe(*result.probe, reporting.count(result.model), result.blocks))
        except NotVerified as error:
            raise CannotGoOn(f"the result was not kept: {error}") from error


@torch.no_grad()
def probed(model: nn.Module, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """A few windows and the float32 logits of the model, whose parameters are float32 afterwards; paged, at rest."""
    ids = tokens.first(PROBE).ids
    if paging.pager_of(model) is None:
        stored_as(model, torch.float32)
    logits = model(ids, use_cache=False).logits
    paging.rest(model)
    return ids, logits


def limits(model: Any) -> dict[str, int]:
    """What tokens must not exceed."""
    return {
        "max_seqlen": int(getattr(model.config, "max_position_embeddings", 2048)),
        "vocab_size": int(model.get_input_embeddings().weight.shape[0]),
    }
