"""From a recipe to what it names: every plug-in built once, checked beside the others, passed on as `Parts`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from prunekit.data.sources import is_file
from prunekit.data.spec import DataSpec
from prunekit.data.windows import DEFAULTS, JUDGED
from prunekit.errors import PluginError, WrongInput
from prunekit.layer.statistics import Need
from prunekit.plugins.allocator import Allocator, NoAllocator
from prunekit.plugins.engine import Engine
from prunekit.plugins.exporter import Exporter
from prunekit.plugins.finisher import Finisher
from prunekit.plugins.guard import instance
from prunekit.plugins.learner import Learner, Training
from prunekit.plugins.metric import MeasuredMetric
from prunekit.plugins.objective import Objective
from prunekit.plugins.pruner import LocalPruner
from prunekit.plugins.registry import (
    ALLOCATORS,
    ENGINES,
    EXPORTERS,
    FINISHERS,
    KINDS,
    LEARNERS,
    METRICS,
    OBJECTIVES,
    PRUNERS,
    SIGNALS,
    WIDTHS,
)
from prunekit.plugins.signal import Signal
from prunekit.plugins.width import Width
from prunekit.recipe.schema import Recipe
from prunekit.recipe.specs import SpareSpec
from prunekit.space.forms import Form, Units, parse_form
from prunekit.space.latency import LatencySpec
from prunekit.space.metrics import Metric

WITHOUT_EFFECT = frozenset(
    {"version", "engine", "device", "memory", "exporters", "code", "verify", "samples", "trust_remote_code"}
)  # on the weights that come out


@dataclass(frozen=True, eq=False)
class Parts:
    """What a recipe names, built once and checked; the recipe itself has every option of it written out."""

    recipe: Recipe
    form: Form  # what is removed
    pruner: LocalPruner
    allocator: Allocator
    learner: Learner | None  # in the place of an allocator
    signals: tuple[Signal, ...]  # layer sensitivity metrics that the allocator asks for
    objective: Objective
    finishers: tuple[Finisher, ...]
    engine: Engine
    metric: Metric
    exporters: tuple[Exporter, ...]
    width: Width | None = None  # what narrows the residual stream first

    @property
    def members(self) -> list[Parts]:
        """The same plug-ins under the recipe of every member of the family, by ascending sparsity."""
        return [replace(self, recipe=member) for member in self.recipe.members]

    @cached_property
    def needs(self) -> frozenset[Need]:
        """Statistics of a layer that the pruner and the sensitivity metrics read."""
        return self.pruner.needs.union(*(signal.needs for signal in self.signals))

    @property
    def trains(self) -> bool:
        """Whether a finisher learns from text of its own."""
        return any(finisher.trains for finisher in self.finishers)

    @property
    def learns(self) -> bool:
        """Whether anybody trains: then there is text for it, which nothing else reads."""
        return self.trains or self.objective.training(1 << 40) > 0

    def prices_nats(self, depth: int) -> bool:
        """Whether anybody reads what rungs cost in nats, of a model of so many blocks."""
        return "nats" in self.allocator.needs or self.objective.reads(depth).nats

    def searches(self, depth: int) -> bool:
        """Whether a search sends tokens through the model."""
        return self.allocator.asks and bool(self.objective.reads(depth).tokens)

    def prices_alone(self, depth: int) -> bool:
        """Whether a search asks for prices of rungs and sends no token through them: then no candidate is made but at
        the centre, which is carried."""
        return self.recipe.rebuild and self.recipe.carry != "expected" and not self.searches(depth)

    @property
    def amounts(self) -> Mapping[str, int]:
        """Tokens of every part where nobody has said how many: a result that no search was for is judged on fewer."""
        return DEFAULTS if self.searches(1) or self.learner is not None else DEFAULTS | {"search": JUDGED}

    def with_text(self, model: str, data: DataSpec) -> Parts:
        """Write the model's name and every choice about the tokens into the recipe."""
        return replace(self, recipe=self.recipe.model_copy(update={"model": model, "data": data}))

    def with_data(self, data: DataSpec) -> Parts:
        """Take other text, or another amount of it."""
        return replace(self, recipe=self.recipe.model_copy(update={"data": data}))

    def with_dtype(self, dtype: str) -> Parts:
        """Write the dtype of the computation into the recipe."""
        return replace(self, recipe=self.recipe.model_copy(update={"dtype": dtype}))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of what is removed, that the residual width may take; several are to be tried. None without a width."""
        return () if self.width is None else self.width.shares

    def with_share(self, share: float, among: int = 1) -> Parts:
        """Take one share of several, as a recipe of its own would: without a width for a share of 0.

        Args:
            share: one of `shares`.
            among: how many are tried, each with its part of the limit of the search.
        """
        width = None if self.width is None or not share else replace(self.width, share=share)
        spec, limit = None if width is None else WIDTHS.spec(width), self.recipe.search_budget
        updates = {"width": spec, "search_budget": None if limit is None else limit // among}
        return replace(self, width=width, recipe=self.recipe.model_copy(update=updates))

    def with_metric(self, metric: Metric) -> Parts:
        """Take another metric, or the same with what was measured, and write it into the recipe."""
        return replace(self, metric=metric, recipe=_with_metric(self.recipe, metric))

    @property
    def units(self) -> Units:
        """The structure that whoever writes or reads the result must know."""
        return "values" if self.recipe.heads == "narrow" else self.form.units

    def determining(self) -> dict[str, Any]:
        """The values that determine the weights: neither device nor packaging does (`WITHOUT_EFFECT`)."""
        unread = self.recipe.unsaid | WITHOUT_EFFECT | (self.recipe.sections.keys() - {self.recipe.metric_spec["name"]})
        return self.recipe.model_dump(mode="json", exclude=set(unread))

    @property
    def digest(self) -> str:
        """sha256 of what determines the weights."""
        return hashlib.sha256(json.dumps(self.determining(), sort_keys=True).encode()).hexdigest()


Named = tuple[str, Mapping[str, Any], LocalPruner | Finisher | Exporter | Learner]
"""(kind, what the recipe says, plug-in)."""


def resolve(recipe: Recipe) -> Parts:
    """Build what a recipe names, and check it before any work.

    Args:
        recipe: with as many options of plug-ins as differ from their defaults.

    Returns:
        The plug-ins, and the recipe with every option of every plug-in written out.

    Raises:
        WrongInput: a name, option or value that does not exist, parts that do not go together, or a file that is not
            there.
    """
    _check_budget(recipe)
    learner = None if recipe.learner is None else LEARNERS.build(recipe.learner)
    allocator = NoAllocator() if recipe.allocator is None else ALLOCATORS.build(recipe.allocator)
    instance(allocator, "signals", allocator.signals, (tuple, list))
    parts = Parts(
        recipe,
        parse_form(recipe.structure),
        PRUNERS.build(recipe.pruner),
        allocator,
        learner,
        tuple(map(SIGNALS.build, allocator.signals)),
        OBJECTIVES.build(recipe.objective),
        tuple(map(FINISHERS.build, recipe.finishers)),
        ENGINES.build(recipe.engine),
        METRICS.build(recipe.metric_spec),
        _exporters(recipe),
        None if recipe.width is None else WIDTHS.build(recipe.width),
    )
    _check_plugins(parts)
    _check_learned(parts)
    complete = {
        "pruner": PRUNERS.spec(parts.pruner),
        "allocator": ALLOCATORS.spec(allocator) if learner is None else None,
        "learner": None if learner is None else LEARNERS.spec(learner),
        "learned": None if learner is None else recipe.learned or ("weights" if learner.training else "groups"),
        "width": None if parts.width is None else WIDTHS.spec(parts.width),
        "objective": OBJECTIVES.spec(parts.objective),
        "finishers": tuple(map(FINISHERS.spec, parts.finishers)),
        "engine": ENGINES.spec(parts.engine),
        "exporters": tuple(map(EXPORTERS.spec, parts.exporters)),
    }
    parts = replace(parts, recipe=_with_metric(recipe, parts.metric).model_copy(update=complete))
    _check_consent(parts.recipe)
    _check_structure(parts)
    _check_narrow_heads(parts)
    _check_readers(parts)
    _check_patches(parts)
    _check_learner(parts)
    _check_width(parts)
    _check_experts(parts)
    return parts


def _with_metric(recipe: Recipe, metric: Metric) -> Recipe:
    """The recipe with a metric; a bare name where no option differs from its default, or they have a section."""
    spec, sections = METRICS.spec(metric), recipe.sections
    name = spec.pop("name")
    updates: dict[str, Any] = {key: part.model_copy(update={"prices": None}) for key, part in sections.items()}
    if name in sections:
        return recipe.model_copy(update=updates | {"metric": name, name: LatencySpec(**spec)})
    defaults = {option.name: option.default for option in METRICS[name].options}
    said = {key: value for key, value in spec.items() if value != defaults[key]}
    return recipe.model_copy(update=updates | {"metric": {"name": name, **said} if said else name})


def _exporters(recipe: Recipe) -> tuple[Exporter, ...]:
    """One that makes the folder which transformers loads, and what else is asked for."""
    exporters = [EXPORTERS.build(spec) for spec in recipe.exporters]
    if all(exporter.place for exporter in exporters):
        exporters = [*map(EXPORTERS.build, Recipe.model_fields["exporters"].default), *exporters]
    places = [instance(exporter, "place", exporter.place, str) for exporter in exporters]
    if twice := sorted({place or "the result itself" for place in places if places.count(place) > 1}):
        raise WrongInput(f"two exporters write {twice[0]}; every exporter needs a place of its own")
    return tuple(exporters)


def _check_budget(recipe: Recipe) -> None:
    if recipe.apart and recipe.of == "model":
        raise WrongInput("apart gives attention and MLP each their share of the blocks; it does not go with of=model")
    family, own = list(recipe.family), recipe.sparsity
    if family and (family != sorted({*family, own}) or len(family) < 2):
        raise WrongInput(
            f"family names all sparsities that were searched together, this recipe's {own} too, ascending, not {family}"
        )


def _check_consent(recipe: Recipe) -> None:
    """Whom a plug-in talks to, and with which key, the caller says, or the plug-in itself, which was installed."""
    for key, (name, value) in recipe.outward.items():
        if key not in recipe.from_file or value is None:
            continue
        own = [option for registry in KINDS if name in registry for option in registry[name].options]
        if any(option.name == key.rpartition(".")[2] and option.default == value for option in own):
            continue
        raise WrongInput(
            f"the recipe's file says {key}={value}; whom to talk to, and with which key, is for the caller to say: "
            f"give --set {key}={value} if you trust it, {key.replace('.', '__')}={value!r} in Python, or another"
        )


def _check_plugins(parts: Parts) -> None:
    """What plug-ins say of themselves is of the kind that is asked for."""
    sets = (frozenset, set)
    instance(parts.allocator, "needs", parts.allocator.needs, sets)
    for reader in (parts.pruner, *parts.signals):
        instance(reader, "needs", reader.needs, sets)
    learners = () if parts.learner is None else (parts.learner,)
    for plugin in (parts.pruner, *parts.finishers, *parts.exporters, parts.metric, *learners):
        instance(plugin, "structures", plugin.structures, sets)
    for learner in learners:
        if instance(learner, "training", learner.training, (Training, type(None))) is not None and learner.nests:
            raise PluginError(
                f"{type(learner).__name__} trains weights and nests; every budget needs weights of its own"
            )
    for finisher in parts.finishers:
        instance(finisher, "adds_biases", finisher.adds_biases, bool)
        instance(finisher, "trains", finisher.trains, bool)
    instance(parts.metric, "unit", parts.metric.unit, str)


def _check_structure(parts: Parts) -> None:
    """Every part must know what is removed."""
    recipe, form = parts.recipe, parts.form
    own = form.kept_share
    if own is not None and recipe.family:
        raise WrongInput(
            f"structure {recipe.structure} says its own sparsity, so there is no family of several; "
            "take structure groups or weights"
        )
    named = _named(parts)
    for kind, spec, plugin in named:
        if form.units not in plugin.structures:
            there = ", ".join(sorted(plugin.structures))
            raise WrongInput(f"{kind} {spec['name']!r} does not know structure {form.units}; it knows {there}")
    parts.metric.check(form.units)
    if form.coupled:
        return
    for kind, spec, plugin in named:
        if isinstance(plugin, Finisher) and plugin.adds_biases:
            raise WrongInput(f"{kind} {spec['name']!r} adds biases, paid for with groups; leave them away here")
    if recipe.apart:
        raise WrongInput("apart gives attention and MLP each their share of groups; it goes with structure groups")
    if recipe.multiple_of > 1:
        raise WrongInput("multiple_of is of the neurons that an MLP keeps; it goes with structure groups")
    if "scores" in parts.allocator.needs and recipe.allocator is not None:
        raise WrongInput(f"allocator {recipe.allocator['name']!r} ranks groups; it goes with structure groups")
    for signal in parts.signals:
        if {"influence", "turn"} & signal.needs:
            name = SIGNALS.name_of(signal)
            raise WrongInput(f"signal {name!r} is of whole sub-layers; it goes with structure groups")
    if own is not None and (recipe.sparsity != float(1 - own) or recipe.of == "model"):
        raise WrongInput(
            f"structure {recipe.structure} removes {float(1 - own):.4g} of the weights of all linear maps in "
            "blocks; leave sparsity and of away, or take structure weights"
        )


def _named(parts: Parts) -> list[Named]:
    """Everybody who must know what is removed."""
    recipe = parts.recipe
    return [
        ("pruner", recipe.pruner, parts.pruner),
        *([("learner", recipe.learner, parts.learner)] if recipe.learner and parts.learner else []),
        *(("finisher", *each) for each in zip(recipe.finishers, parts.finishers, strict=True)),
        *(("exporter", *each) for each in zip(recipe.exporters, parts.exporters, strict=True)),
    ]


def _check_narrow_heads(parts: Parts) -> None:
    """Inside of attention, ranks and widths of values are counted; beside it, groups."""
    recipe, instead = parts.recipe, "choose heads: kv, or leave it away"
    if recipe.heads != "narrow":
        return
    if not parts.form.coupled:
        raise WrongInput(f"heads: narrow goes with structure groups, not {recipe.structure}; leave one of them away")
    for kind, spec, plugin in _named(parts):
        if not plugin.structures >= ({"low-rank", "values"} if kind == "pruner" else {"values"}):
            raise WrongInput(
                f"{kind} {spec['name']!r} does not know the narrower heads that heads: narrow makes; leave it away, or "
                "choose heads: kv"
            )
    parts.metric.check("values")
    if recipe.width is not None:
        raise WrongInput(f"heads: narrow and width do not go together yet; {instead}")
    if "scores" in parts.allocator.needs and recipe.allocator is not None:
        raise WrongInput(f"allocator {recipe.allocator['name']!r} ranks groups, of which heads have none; {instead}")


def _check_patches(parts: Parts) -> None:
    """What comes beside MLPs is paid for before anything is searched, and nothing that fits sub-layers looks at it."""
    recipe = parts.recipe
    adding = [i for i, finisher in enumerate(parts.finishers) if type(finisher).reserved is not Finisher.reserved]
    if not adding:
        return
    name = f"finisher {recipe.finishers[adding[0]]['name']!r}"
    if behind := recipe.finishers[adding[0] + 1 :]:
        raise WrongInput(
            f"{name} puts linear maps beside MLPs, at which {behind[0]['name']!r} behind it does not look; let it "
            "come last"
        )
    if isinstance(parts.metric, MeasuredMetric):
        raise WrongInput(
            f"what {name} adds has no price in {parts.metric.unit}, which is measured on the dense model; choose "
            "metric parameters, bytes or flops"
        )
    for spec, exporter in zip(recipe.exporters, parts.exporters, strict=True):
        if "low-rank" not in exporter.structures:
            raise WrongInput(
                f"exporter {spec['name']!r} cannot write the linear maps of low rank that {name} puts beside MLPs; "
                "leave one of them away"
            )


def _check_learner(parts: Parts) -> None:
    """A learner reads as much as its options say, so that nothing else may limit it."""
    recipe = parts.recipe
    if recipe.learner is None:
        return
    for key, value in (("search_budget", recipe.search_budget), ("time", recipe.time)):
        if value is not None:
            raise WrongInput(
                f"{key} limits searches, and learner {recipe.learner['name']!r} reads what its own options say; leave "
                f"{key} away, and see `prunekit list {recipe.learner['name']}`"
            )


def _check_learned(parts: Parts) -> None:
    """What is taken over of a learner, it learns, and the pruner does not replace it."""
    recipe, learner = parts.recipe, parts.learner
    if recipe.learner is None or learner is None:
        if recipe.learned is not None:
            raise WrongInput(
                f"learned {recipe.learned} is what is taken over of a learner, and an allocator decides here; leave "
                "learned away, or give a learner"
            )
        return
    name = f"learner {recipe.learner['name']!r}"
    if recipe.learned == "weights" and learner.training is None:
        raise WrongInput(
            f"learned weights takes over what is trained, and {name} trains no weights; give groups or counts"
        )
    if not (option := instance(learner, "scaled_by", learner.scaled_by, str)):
        return
    if recipe.learned == "counts":
        raise WrongInput(
            f"{name} pays with {option} for a scale of every group that is kept, and learned counts leaves groups and "
            f"scales behind; give --set learner.{option}=0, or learned groups"
        )
    if not instance(parts.pruner, "keeps_scales", parts.pruner.keeps_scales, bool):
        raise WrongInput(
            f"{name} pays with {option} for a scale of every group that is kept, and pruner "
            f"{recipe.pruner['name']!r} replaces scaled weights by those it solves for; give --set learner.{option}=0, "
            "or a pruner that keeps the weights, such as magnitude, or as obs does with refit off"
        )


def _check_width(parts: Parts) -> None:
    """The narrower model is pruned in the place of the dense one; what holds both beside each other is told apart."""
    recipe = parts.recipe
    if recipe.width is None:
        return
    name = f"width {recipe.width['name']!r}"
    if not parts.form.coupled:
        raise WrongInput(f"{name} goes with structure groups, not {recipe.structure}; leave one of them away")
    if recipe.family:
        raise WrongInput(f"{name} makes another model for every sparsity, which share no pass; give one sparsity")
    if recipe.apart:
        raise WrongInput(f"apart gives attention and MLP each their share, and {name} takes of both; leave one away")
    if recipe.spare != SpareSpec():
        raise WrongInput(f"{name} narrows every block, and spare keeps some of them whole; leave one of them away")
    if not parts.metric.counts_width:
        raise WrongInput(
            f"what {name} frees cannot be counted in {parts.metric.unit}; choose metric parameters, bytes or flops"
        )
    if recipe.engine["name"] != "local":
        raise WrongInput(f"{name} is worked with on this machine alone; give engine local")
    for spec, finisher in zip(recipe.finishers, parts.finishers, strict=True):
        if not finisher.knows_width:
            raise WrongInput(
                f"finisher {spec['name']!r} compares the residual streams of both models, and {name} makes one "
                "narrower; take distillation or lora"
            )
    if parts.objective.reads(1 << 10).depths:
        raise WrongInput(
            f"objective {recipe.objective['name']!r} compares the residual streams of both models, and {name} makes "
            "one narrower; take divergence or expected-error"
        )
    if len(parts.shares) > 1:
        _check_shares(parts, name)


def _check_shares(parts: Parts, name: str) -> None:
    """Several shares of a width are told apart by what the objective says of them on text."""
    recipe = parts.recipe
    if not parts.objective.reads(1 << 10).tokens:
        raise WrongInput(
            f"{name} tries several shares, and objective {recipe.objective['name']!r} reads no text, so that it cannot "
            "compare models of several widths; give --objective divergence, or one share"
        )
    if recipe.time is not None:
        raise WrongInput(
            f"time is shared out to one search, and {name} has one for every share; give amounts of text and "
            "search_budget in the place of time, or one share"
        )


def _check_experts(parts: Parts) -> None:
    """The model without whole experts is pruned in the place of the dense one, as a narrower one is."""
    recipe = parts.recipe
    if recipe.experts != "both":
        return
    if recipe.family:
        raise WrongInput("experts: both makes another model for every sparsity, which share no pass; give one sparsity")
    if recipe.apart:
        raise WrongInput(
            "apart gives every kind its share, and with experts: both whole experts have experts_share of all; leave "
            "one of them away"
        )
    if recipe.engine["name"] != "local":
        raise WrongInput("experts: both is worked with on this machine alone; give engine local")


def _check_readers(parts: Parts) -> None:
    """What one part reads another has: scores, a second data set, files."""
    recipe, pruner = parts.recipe, parts.pruner
    scored = "scores" in parts.allocator.needs and type(pruner).scores is LocalPruner.scores
    if scored and recipe.allocator is not None:
        raise WrongInput(
            f"allocator {recipe.allocator['name']!r} ranks groups by the pruner's scores, and pruner "
            f"{recipe.pruner['name']!r} has none; choose another of either"
        )
    if "sub-layer" in pruner.needs and recipe.carry != "dense":
        raise WrongInput(
            f"pruner {recipe.pruner['name']!r} trains sub-layers on what reaches them in the dense model, and carry is "
            f"{recipe.carry}; give --set carry=dense"
        )
    readers = {f"signal {SIGNALS.name_of(signal)!r}": signal.needs for signal in parts.signals}
    for who, needs in {f"pruner {recipe.pruner['name']!r}": pruner.needs, **readers}.items():
        if "contrast" in needs and recipe.data.contrast_dataset is None:
            raise WrongInput(
                f"{who} compares two data sets; give the second with --set data.contrast_dataset=NAME_OR_FILE"
            )
    for dataset in recipe.data.names:
        is_file(dataset)
