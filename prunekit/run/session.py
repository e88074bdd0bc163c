"""One opening for prune, family and tune: the model, its text, devices and engine, prices, and what tells runs apart.

Everything the user may have got wrong is refused here, before any long work.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit.data.draws import Draws, amounts, draw, window_of
from prunekit.data.spec import DataSpec
from prunekit.data.windows import DEFAULTS, LEAST, whole_windows
from prunekit.errors import WrongInput
from prunekit.export.formats import check_installed
from prunekit.measure.fit import doubts
from prunekit.models.opening import limits, measured_dtype, opened, resolved_devices, skeleton
from prunekit.plugins.adapter import ModelAdapter
from prunekit.plugins.dense import Dense
from prunekit.plugins.engine import Opening, Team
from prunekit.plugins.exporter import Order
from prunekit.plugins.guard import instance, unchanged
from prunekit.plugins.metric import MeasuredMetric
from prunekit.plugins.registry import EXPORTERS, identify_code
from prunekit.recipe.resolve import Parts, resolve
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.run.allotment import Allotment, filled, share_text
from prunekit.run.clock import Clock
from prunekit.run.experts import without_experts
from prunekit.run.plan.count import Shape
from prunekit.run.plan.make import planned
from prunekit.run.plan.plan import Plan
from prunekit.run.plan.rehearsal import foresee_limit
from prunekit.run.plan.shares import plan_shares
from prunekit.run.plan.trial import Trials, forward_seconds
from prunekit.run.shares import choose_share
from prunekit.run.spaces import check_sites, share_spaces, whole_space
from prunekit.run.stages import Run, clear_folder
from prunekit.run.together import Measures
from prunekit.run.width import narrow
from prunekit.run.workplace import begun
from prunekit.search.ledger import Ledger
from prunekit.search.probing import Spent
from prunekit.search.teacher import Teacher
from prunekit.space.ladders import Space
from prunekit.space.prices import FILE
from prunekit.system.files import Damaged, digest, read_state, write_json, write_state
from prunekit.system.progress import Progress, span
from prunekit.system.rates import Rates
from prunekit.system.sizes import amount

LONG, SHORT = 3600, "fast"  # seconds after which a shorter recipe is named, and which
MORE = "give a larger search_budget, or an allocator that begins without probes"
PRICED = "priced.json"  # beside the prices of a run that is at work: their digest


@dataclass(frozen=True, eq=False)
class Job:
    """What is asked of a run beside its recipe."""

    model: PreTrainedModel | None = None  # in memory, with its tokenizer; None: the recipe names one
    tokenizer: Any = None
    output: Path | None = None  # folder of the result; None: it stays in memory
    progress: Progress = field(default_factory=Progress)  # what the user is told; the base class says nothing
    resume: bool = True  # whether an interrupted run of the same recipe is continued
    overwrite: bool = False  # whether an earlier result in `output` may be replaced
    announce: bool = False  # whether the user is told what it will take before it begins
    page: bool = False  # whether a page about the result is written into it


@dataclass(frozen=True, eq=False)
class Session:
    """An open model and all that runs over it share."""

    parts: Parts  # the model's name, every choice about the text and, once known, the prices written in
    source: str | PreTrainedModel
    dense: Dense
    draws: Draws
    plan: Plan
    devices: Sequence[torch.device]
    progress: Progress
    clock: Clock  # of what is done once for all runs
    allotment: Allotment | None = None  # of the recipe's time; None: it has none
    measured: Mapping[str, str] = field(default_factory=dict)  # recipe key -> what this machine has said
    team: Team | None = None  # who shares the work; None: nobody

    def identify(self) -> dict[str, Any]:
        """Say what a run must agree in to go on with an earlier one: recipe, weights, versions and plug-ins' code."""
        mine = {"weights": self.dense.fingerprint, "versions": reporting.versions(self.parts)}
        mine |= identify_code(self.parts.recipe.model_dump(mode="json"))
        return self.parts.determining() | mine | ({"measured": dict(self.measured)} if self.measured else {})

    def with_prices(self, past: Path | None) -> Session:
        """Find the prices that a measured metric needs.

        Args:
            past: folder in which an earlier run of the same identity has left its table; None: there is none.

        Returns:
            This session, with the recipe's own table, that of `past`, or one measured now, in its recipe.
        """
        metric, dense = self.parts.metric, self.dense
        with self.clock("time"):
            if not isinstance(metric, MeasuredMetric):
                return self
            recipe = self.parts.recipe
            sites = dense.adapter.sites_of(dense.model, self.parts.form, recipe.heads, recipe.inside)
            with unchanged(metric, values=True, model=dense.model):
                found = metric.measured(dense, sites, None if past is None else _intact(past), self.progress)
            metric = instance(metric, "what it is once measured", found, type(metric))
        return replace(self, parts=self.parts.with_metric(metric))

    def make_spaces(self) -> list[Space]:
        """Make the space of the recipe, or of every member of its family.

        Raises:
            WrongInput: a budget cannot be met.
        """
        dense = self.dense
        return [whole_space(member, dense.model, dense.adapter, dense.dtype) for member in self.parts.members]

    def foresee_limit(self, parts: Parts, whole: Space) -> Spent | None:
        """Foresee where search_budget ends the first search of a recipe.

        Args:
            parts: of this recipe, or of another that is tried on the same model.
            whole: its space of every count.

        Returns:
            None: nowhere, there is no such limit, or it cannot be known.
        """
        limit, search = parts.recipe.search_budget, self.draws.search
        limit = None if limit is None else limit // max(1, len(parts.shares))
        depth = len(self.dense.adapter.blocks(self.dense.model))
        if limit is None or parts.learner is not None or not parts.searches(depth):
            return None

        def training(count: int) -> int:
            learnt = parts.objective.training(count)
            return 3 * search.lessons.first(learnt).n_tokens if learnt and search.lessons is not None else 0

        try:
            return foresee_limit(parts.allocator, whole, search.n_tokens, search.seqlen, limit, training)
        except Exception:  # of a plug-in; it says what is wrong when its turn comes
            return None

    def warn_of_limit(self, spaces: Sequence[Space]) -> None:
        """Say before long work that a limit leaves no room for a search beside its probes, where that is so.

        Args:
            spaces: of the recipe, or of every member of its family.
        """
        for member, whole in zip(self.parts.members, spaces, strict=True):
            if (spent := self.foresee_limit(member, whole)) is not None and spent.by_probes:
                self.progress.say(f"warning: {spent.words}; {MORE}")
                return

    @contextmanager
    def work_in(self, place: AbstractContextManager[Path]) -> Iterator[tuple[Session, Path]]:
        """Work in a folder, with the engine's workers, until the work is done."""
        opening = Opening(self.source, self.parts.recipe.dtype, self.parts.recipe.trust_remote_code)
        with place as folder, self.parts.engine.team(self.dense, opening, self.devices) as team:
            keep_prices(self.parts.recipe, folder)
            yield replace(self, team=team), folder

    def start_runs(
        self,
        parts: Parts,
        spaces: Sequence[Space],
        draws: Draws,
        place: Path,
        shelf: Path,
        clock: Clock,
        measures: Measures | None = None,
    ) -> list[Run]:
        """Start a run for a recipe, or for every member of its family.

        Args:
            parts: of this recipe, or of another that is tried on the same model.
            spaces: of every member, as of `make_spaces`.
            draws: the text of this recipe.
            place: folder for what these runs alone can use again.
            shelf: folder for calibration passes, which other runs over the model may share.
            clock: of what these runs share.
            measures: what their first calibration pass measures, with what others read there; None: their own.
        """
        runs, teacher = list[Run](), Teacher(self.dense.shares, clear_folder(place / "teacher"))
        for member, whole in zip(parts.members, spaces, strict=True):
            own = place / str(member.recipe.sparsity) if parts.recipe.family else place
            own.mkdir(exist_ok=True)
            ledger = Ledger(own / "ledger.jsonl")
            if ledger.damaged is not None:
                self.progress.say(f"{ledger.path} is damaged from line {ledger.damaged} on: that is asked anew")
            dense, wide = self.dense, None
            if len(member.shares) == 1:
                dense, wide = narrow(member, self.dense, draws.calibration, shelf, self.progress, clock), self.dense
            run = Run(
                member, dense, whole, draws, ledger, own, shelf, self.progress,
                Clock(clock), teacher, self.plan.limit, self.team, self.allotment, wide=wide, measures=measures,
            )  # fmt: skip
            if len(member.shares) > 1:
                run = choose_share(run)
            runs.append(without_experts(run) if member.recipe.experts == "both" else run)
        return runs


def foreseen(recipe: Recipe, source: str, output: Path, *, several: bool) -> tuple[Plan, Rates, Allotment | None]:
    """What a run will take, searches rehearsed, how fast this machine is, and how a limited time is shared out.

    Args:
        recipe: of the run.
        source: its model, a folder or a hub id.
        output: folder of the result.
        several: whether results are made of all of its family.

    Raises:
        WrongInput: as `make_plan`.
    """
    asked = [member.sparsity for member in recipe.members] if several else None
    shape = skeleton(source, trust_remote_code=recipe.trust_remote_code)
    parts = _with_measured_dtype(resolve(recipe), shape, Job(output=output))
    if recipe.time is not None:
        allotment, _ = allot(parts, shape, output)
        return allotment.plan, allotment.rates, allotment
    plan = make_plan(parts, *shape, output, asked, rehearse=True, trials=tried(parts, shape))
    return plan, measured_rates(plan, shape, window_of(recipe.data, limits(shape[0])["max_seqlen"])), None


def open_session(parts: Parts, job: Job, asked: Sequence[float] | None = None) -> Session:
    """Plan, then open the model and draw the text of a recipe.

    Args:
        parts: of the recipe.
        job: the model in memory, the output and what the user is told.
        asked: sparsities that a family makes results of; None: of the recipe's own.

    Raises:
        WrongInput: there is no model, it does not fit this machine, or its text cannot be read or judged.
    """
    recipe, progress = parts.recipe, job.progress
    source = recipe.model if job.model is None else job.model
    if source is None:
        raise WrongInput("no model was given; name a folder or a hub id, or pass a model in memory")
    clock = Clock()
    with clock("plan"):
        shape = skeleton(source, trust_remote_code=recipe.trust_remote_code)
        parts = _with_measured_dtype(parts, shape, job)
        measured = {} if parts.recipe.dtype == recipe.dtype else {"dtype": parts.recipe.dtype}
        if "bfloat16" in measured.values():
            progress.say(
                "this processor is fastest in bfloat16, and the model is computed in it; --dtype says otherwise"
            )
        recipe = parts.recipe
        data, allotment, most = recipe.data, None, parts.amounts
        if recipe.time is None:
            trials = tried(parts, shape) if job.announce else None
            plan = make_plan(parts, *shape, job.output, asked, rehearse=job.announce, trials=trials)
        else:
            begun_with = _begun_with(job, recipe)
            data = begun_with or data
            allotment, most = allot(parts.with_data(data), shape, job.output, chosen=begun_with is not None)
            plan = allotment.plan
        plan.check()
    if allotment is not None:
        progress.say(f"in {span(allotment.seconds)}: {allotment}")
    elif job.announce:
        _announce(parts, shape, plan, job, asked)
    devices = choose_devices(recipe, plan)
    if plan.paged:
        _check_paged(parts, plan)
        progress.say(_paged(plan))
        if job.output is None:
            raise WrongInput("a model that does not fit memory needs a folder for the result; give output")
    with clock("open"):
        dense = opened(
            source, job.tokenizer, device=_opened_on(recipe, source, plan), dtype=recipe.dtype,
            trust_remote_code=recipe.trust_remote_code, shares=plan.shares,
        )  # fmt: skip
        order = Order(
            dense.adapter, parts.units, recipe.code, config=dense.model.config, tokenizer=dense.tokenizer,
            spared=frozenset(recipe.spare.kinds),
        )  # fmt: skip
        for exporter in parts.exporters:
            exporter.check(order)
        draws = draw(
            dense.tokenizer, data, progress,
            seed=recipe.seed, recovery=parts.learns, most=most, **limits(dense.model),
        )  # fmt: skip
        parts.objective.check(draws.search)
        if parts.learner is not None:
            parts.learner.check(draws.search)
        for doubt in doubts(dense.model, dense.tokenizer, draws.calibration, reporting.count(shape[0])):
            progress.say(doubt)
    parts = parts.with_text(dense.name, draws.spec)
    return Session(parts, source, dense, draws, plan, devices, progress, clock, allotment, measured)


def allot(
    parts: Parts, shape: tuple[PreTrainedModel, ModelAdapter], output: Path | None, *, chosen: bool = False
) -> tuple[Allotment, Mapping[str, int]]:
    """Share out the time of a recipe.

    Args:
        parts: of the recipe.
        shape: the model, or its skeleton, and the adapter of its family.
        output: folder of the result; None: it stays in memory.
        chosen: whether the text is that of an unfinished run, which goes on however slow the machine is now.

    Returns:
        How the time is shared out, and the most text of every part that leaves its amount open.

    Raises:
        WrongInput: it is too short, or of a family of results.
    """
    recipe = parts.recipe
    assert recipe.time is not None
    if recipe.family:
        raise WrongInput("a time is of one result; give one sparsity, or leave --time away")

    trials, begun_at = tried(parts, shape), time.perf_counter()

    def plan_of(data: DataSpec) -> Plan:
        return make_plan(parts.with_data(data), *shape, output, trials=trials)

    first = plan_of(recipe.data)
    seqlen = window_of(recipe.data, limits(shape[0])["max_seqlen"])
    rates = measured_rates(first, shape, seqlen)
    most = parts.amounts if chosen else share_text(parts, seqlen, plan_of, rates, time.perf_counter() - begun_at)
    data = filled(recipe.data, most)
    text = {part: getattr(data, f"{part}_tokens") for part in most}
    return Allotment(recipe.time, plan_of(data), rates, parts.trains, text), most


def measured_rates(plan: Plan, shape: tuple[PreTrainedModel, ModelAdapter], seqlen: int) -> Rates:
    """How fast this machine is where a plan wants to work: products are counted at what a block of the model reaches.

    Args:
        plan: its device, its dtype and its disk.
        shape: the model, or its skeleton, and the adapter of its family.
        seqlen: tokens in a window.
    """
    rates, counted = (
        Rates.measured(plan.device, plan.dtype, plan.place or Path()),
        Shape(*shape, (), plan.dtype, plan.dtype),
    )
    timed = forward_seconds(*shape, seqlen, plan.device, plan.dtype)
    if timed is None:
        return rates
    seconds, tokens = timed
    return replace(rates, flops=counted.forward(tokens, seqlen, head=False) / len(counted.blocks) / seconds)


def _with_measured_dtype(parts: Parts, shape: tuple[PreTrainedModel, ModelAdapter], job: Job) -> Parts:
    """With a dtype that was measured in the recipe: by an unfinished run that is gone on with, or now."""
    asked, device = parts.recipe.dtype, resolved_devices(parts.recipe.device)[0]
    if asked != "auto":
        return parts
    earlier = begun(job.output) if job.output is not None and job.resume else None
    found = (earlier or {}).get("measured", {}).get("dtype")
    return parts.with_dtype(found or measured_dtype(*shape, asked, device))


def _begun_with(job: Job, recipe: Recipe) -> DataSpec | None:
    """The amounts of text that an unfinished run under the same time has chosen; None: there is none to go on with."""
    found = begun(job.output) if job.output is not None and job.resume else None
    if found is None or found.get("time") != recipe.time or not isinstance(found.get("data"), dict):
        return None
    chosen = {f"{part}_tokens": found["data"].get(f"{part}_tokens") for part in DEFAULTS}
    return DataSpec.model_validate(recipe.data.model_dump() | chosen)


def _announce(
    parts: Parts, shape: tuple[PreTrainedModel, ModelAdapter], plan: Plan, job: Job, asked: Sequence[float] | None
) -> None:
    """Say what a run will take before it begins and, where that is long, what takes less."""
    rates = measured_rates(plan, shape, window_of(parts.recipe.data, limits(shape[0])["max_seqlen"]))
    told = plan.as_dict(rates)
    least = "" if told["seconds_complete"] else "at least "
    job.progress.say(
        f"this takes {least}{span(told['seconds_known'])}, {amount(told['memory'])} of memory and "
        f"{amount(plan.disk)} of disk; `prunekit plan` with the same options says where"
    )
    if told["seconds_known"] > LONG:
        options, took = _shorter(parts.recipe, shape, job.output, asked, rates, told["seconds_known"] / 10)
        if took < told["seconds_known"] / 2:
            job.progress.say(
                f"with {options} in the place of the method's options it takes {span(took)}; ctrl-c stops, the same "
                "command goes on"
            )


def _shorter(
    recipe: Recipe,
    shape: tuple[PreTrainedModel, ModelAdapter],
    output: Path | None,
    asked: Sequence[float] | None,
    rates: Rates,
    seconds: float,
) -> tuple[str, float]:
    """Options of a run of the same text and budget in so many seconds, if fewer tokens get there, and what it takes."""
    kept = {"pruner", "sparsity", "family", "structure", "of", "heads", "experts", "dtype", "device", "memory"}
    same = recipe.model_dump(include=kept)
    same |= {f"data.{key}": value for key, value in recipe.data.model_dump(exclude_defaults=True).items()}
    seqlen = window_of(recipe.data, limits(shape[0])["max_seqlen"])

    def taken(tokens: int) -> float:
        short = resolve(Recipe.load(SHORT).with_overrides(same | {"data.calibration_tokens": tokens}))
        plan = make_plan(short, *shape, output, asked, trials=tried(short, shape))
        return plan.as_dict(rates)["seconds_known"]

    tokens = Recipe.load(SHORT).data.calibration_tokens or DEFAULTS["calibration"]
    took = taken(tokens)
    if took > seconds:
        tokens = max(whole_windows(LEAST, seqlen), int(tokens * seconds / took) // seqlen) * seqlen
        took = taken(tokens)
    return f"--recipe {SHORT} --calibration-tokens {tokens}", took


def make_plan(
    parts: Parts,
    shape: PreTrainedModel,
    adapter: ModelAdapter,
    output: Path | None,
    asked: Sequence[float] | None = None,
    *,
    rehearse: bool = False,
    trials: Trials | None = None,
) -> Plan:
    """Count what a recipe will take, from the model's shapes alone.

    As long as nothing was measured, another metric stands in for one that is.

    Args:
        parts: of the recipe.
        shape: the model, or its skeleton.
        adapter: of its family.
        output: folder of the result; None: it stays in memory.
        asked: sparsities that a family makes results of; None: of the recipe's own.
        rehearse: whether searches are held on a stand-in table, to say how long they take.
        trials: what is known of how long the pruner works; None: it is left out.

    Raises:
        WrongInput: the budget cannot be met, a finisher or an exporter cannot do what is asked, or memory is no amount.
    """
    if len(parts.shares) > 1:
        stored = next(shape.parameters()).dtype
        tried = [each.share for each in share_spaces(parts, shape, adapter, stored)]
        plans = {
            share: make_plan(
                parts.with_share(share, len(tried)), shape, adapter, output, asked, rehearse=rehearse, trials=trials
            )
            for share in tried
        }
        seqlen = window_of(parts.recipe.data, limits(shape)["max_seqlen"])
        return plan_shares(plans, amounts(parts.recipe.data, seqlen, parts.amounts)["search"])
    counted = parts
    if isinstance(parts.metric, MeasuredMetric) and parts.metric.prices is None:
        sites = adapter.sites_of(shape, parts.form, parts.recipe.heads, parts.recipe.inside)
        check_sites(parts, sites)  # the stand-in is another metric
        counted = parts.with_metric(parts.metric.stand_in())
        counted = replace(counted, recipe=counted.recipe.model_copy(update={"of": "blocks"}))
    spaces = [whole_space(member, shape, adapter, next(shape.parameters()).dtype) for member in counted.members]
    for finisher in parts.finishers:
        finisher.check(adapter)
    spared = frozenset(parts.recipe.spare.kinds)
    order = Order(adapter, parts.units, parts.recipe.code, config=shape.config, spared=spared)
    for exporter in parts.exporters:
        check_installed(exporter, f"exporter {EXPORTERS.name_of(exporter)!r}")
        exporter.check(order)
    return planned(parts, shape, adapter, spaces, output, asked, rehearse=rehearse, trials=trials)


def tried(parts: Parts, shape: tuple[PreTrainedModel, ModelAdapter]) -> Trials:
    """Where the recipe's pruner can be tried, to say how long it works."""
    recipe, stored = parts.recipe, next(shape[0].parameters()).dtype
    return Trials(parts.pruner, parts.pruner.needs, recipe.damping, resolved_devices(recipe.device)[0], stored)


def choose_devices(recipe: Recipe, plan: Plan) -> Sequence[torch.device]:
    """Find the devices that an engine may open copies of the model on, the first of them being that of the dense one.

    Raises:
        WrongInput: work is to be shared out on a model that is read block by block.
    """
    if plan.paged and recipe.engine["name"] != "local":
        raise WrongInput(
            f"engine {recipe.engine['name']} shares the work among copies of the model, and it does not fit "
            f"{amount(plan.limit)} of memory; give engine local, or more --memory"
        )
    return plan.devices[:1] if plan.paged else plan.devices  # there is one copy, on all of them


def _opened_on(recipe: Recipe, source: str | PreTrainedModel, plan: Plan) -> str:
    """The device, or devices by comma, of the dense model."""
    if isinstance(source, PreTrainedModel) and recipe.device == "auto":
        return recipe.device  # where it is on several, there it stays
    return ",".join(map(str, plan.devices if plan.paged else plan.devices[:1]))


def _check_paged(parts: Parts, plan: Plan) -> None:
    """Refuse what needs all weights at once, of a model that is read block by block."""
    recipe, room = parts.recipe, amount(plan.limit)
    if parts.learner is not None and parts.learner.training is not None:
        assert recipe.learner is not None
        raise WrongInput(
            f"learner {recipe.learner['name']!r} trains weights, all of them in memory, and the model does not fit "
            f"{room}; give more --memory, or a learner that trains gates alone"
        )
    if recipe.width is not None:
        raise WrongInput(
            f"width {recipe.width['name']!r} narrows all weights in memory, and the model does not fit {room}; give "
            "more --memory, or leave width away"
        )
    if recipe.experts == "both":
        raise WrongInput(
            "experts: both prunes a second model in the place of the dense one, all in memory, and the model does not "
            f"fit {room}; give more --memory, or experts: whole or neurons"
        )


def _paged(plan: Plan) -> str:
    """What becomes of a model that does not fit."""
    if len(plan.devices) == 1:
        return f"the model does not fit {amount(plan.limit)} of memory: blocks are read when they are needed"
    return (
        f"the model does not fit {amount(plan.limit)} of memory: its blocks are dealt out to "
        f"{', '.join(map(str, plan.devices))} and read when they are needed; as many as fit stay"
    )


def _intact(folder: Path) -> Path | None:
    """The prices that an earlier run has left; None: it had not come to use any.

    Raises:
        WrongInput: they were changed: what was searched with them cannot be gone on with.
    """
    file, seal = folder / FILE, folder / PRICED
    if not seal.exists():
        return None
    try:
        if read_state(seal) == digest(file):
            return file
    except (Damaged, OSError):
        pass
    raise WrongInput(f"{file} is not what was written; begin again with --no-resume --overwrite")


def keep_prices(recipe: Recipe, folder: Path) -> None:
    """Write the prices into the folder of a run, beside the recipes that name them, where `with_prices` finds them."""
    write_prices(recipe, folder)
    if (folder / FILE).exists():
        write_state(folder / PRICED, digest(folder / FILE))


def write_prices(recipe: Recipe, folder: Path) -> None:
    """Write the prices beside the recipe that names them."""
    if isinstance(prices := recipe.metric_spec.get("prices"), dict):
        write_json(folder / FILE, prices)
