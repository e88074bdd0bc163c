"""From a recipe to what it names: every plug-in built once, checked beside the others, passed on as `Parts`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from prunekit.data.sources import is_file
from prunekit.data.spec import DataSpec
from prunekit.errors import WrongInput
from prunekit.layer.statistics import Need
from prunekit.plugins.allocator import Allocator
from prunekit.plugins.engine import Engine
from prunekit.plugins.exporter import Exporter
from prunekit.plugins.finisher import Finisher
from prunekit.plugins.objective import Objective
from prunekit.plugins.pruner import LocalPruner
from prunekit.plugins.registry import (
    ALLOCATORS,
    ENGINES,
    EXPORTERS,
    FINISHERS,
    METRICS,
    OBJECTIVES,
    PRUNERS,
    SIGNALS,
    signals_of,
)
from prunekit.plugins.signal import Signal
from prunekit.recipe.schema import Recipe
from prunekit.space.forms import Form, parse_form
from prunekit.space.latency import LatencySpec
from prunekit.space.metrics import Metric

WITHOUT_EFFECT = frozenset(
    {"version", "engine", "device", "memory", "exporters", "code", "verify", "trust_remote_code"}
)  # on the weights that come out


@dataclass(frozen=True, eq=False)
class Parts:
    """What a recipe names, built once and checked; the recipe itself has every option of it written out."""

    recipe: Recipe
    form: Form  # what is removed
    pruner: LocalPruner
    allocator: Allocator
    signals: tuple[Signal, ...]  # layer sensitivity metrics that the allocator asks for
    objective: Objective
    finishers: tuple[Finisher, ...]
    engine: Engine
    metric: Metric
    exporters: tuple[Exporter, ...]

    @property
    def members(self) -> list[Parts]:
        """The same plug-ins under the recipe of every member of the family, by ascending sparsity."""
        return [replace(self, recipe=member) for member in self.recipe.members]

    @cached_property
    def needs(self) -> frozenset[Need]:
        """Statistics of a layer that the pruner and the sensitivity metrics read."""
        return self.pruner.needs.union(*(signal.needs for signal in self.signals))

    def with_text(self, model: str, data: DataSpec) -> Parts:
        """Write the model's name and every choice about the tokens into the recipe."""
        return replace(self, recipe=self.recipe.model_copy(update={"model": model, "data": data}))

    def with_metric(self, metric: Metric) -> Parts:
        """Take another metric, or the same with what was measured, and write it into the recipe."""
        return replace(self, metric=metric, recipe=_with_metric(self.recipe, metric))

    def determining(self) -> dict[str, Any]:
        """The values that determine the weights: neither device nor packaging does (`WITHOUT_EFFECT`)."""
        unread = self.recipe.unsaid | WITHOUT_EFFECT | (self.recipe.sections.keys() - {self.recipe.metric_spec["name"]})
        return self.recipe.model_dump(mode="json", exclude=set(unread))

    @property
    def digest(self) -> str:
        """sha256 of what determines the weights."""
        return hashlib.sha256(json.dumps(self.determining(), sort_keys=True).encode()).hexdigest()


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
    form = parse_form(recipe.structure)
    pruner = PRUNERS.build(recipe.pruner)
    finishers = tuple(map(FINISHERS.build, recipe.finishers))
    allocator = ALLOCATORS.build(recipe.allocator)
    signals = signals_of(allocator)
    _check_scores(recipe, pruner, allocator)
    metric, exporters = METRICS.build(recipe.metric_spec), _exporters(recipe)
    _check_form(recipe, form, pruner, finishers, exporters)
    metric.check(form.units)
    if not form.shrinks:
        _check_zeros(recipe, form, allocator, signals, finishers)
    _check_data(recipe, pruner, signals)
    objective, engine = OBJECTIVES.build(recipe.objective), ENGINES.build(recipe.engine)
    complete = {
        "pruner": PRUNERS.spec(pruner),
        "allocator": ALLOCATORS.spec(allocator),
        "objective": OBJECTIVES.spec(objective),
        "finishers": tuple(map(FINISHERS.spec, finishers)),
        "engine": ENGINES.spec(engine),
        "exporters": tuple(map(EXPORTERS.spec, exporters)),
    }
    recipe = _with_metric(recipe, metric).model_copy(update=complete)
    return Parts(recipe, form, pruner, allocator, signals, objective, finishers, engine, metric, exporters)


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
    places = [exporter.place for exporter in exporters]
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


def _check_scores(recipe: Recipe, pruner: LocalPruner, allocator: Allocator) -> None:
    if "scores" in allocator.needs and type(pruner).scores is LocalPruner.scores:
        raise WrongInput(
            f"allocator {recipe.allocator['name']!r} ranks groups by the pruner's scores, and pruner "
            f"{recipe.pruner['name']!r} has none; choose another of either"
        )


def _check_form(
    recipe: Recipe, form: Form, pruner: LocalPruner, finishers: tuple[Finisher, ...], exporters: tuple[Exporter, ...]
) -> None:
    """Every part must know what is removed."""
    if form.kept_share is not None and recipe.family:
        raise WrongInput(
            f"structure {recipe.structure} says its own sparsity, so there is no family of several; "
            "take structure groups or weights"
        )
    named = [("pruner", recipe.pruner, pruner)]
    named += [("finisher", spec, each) for spec, each in zip(recipe.finishers, finishers, strict=True)]
    named += [("exporter", EXPORTERS.spec(each), each) for each in exporters]
    for kind, spec, plugin in named:
        if form.units not in plugin.structures:
            there = ", ".join(sorted(plugin.structures))
            raise WrongInput(f"{kind} {spec['name']!r} does not know structure {form.units}; it knows {there}")


def _check_zeros(
    recipe: Recipe,
    form: Form,
    allocator: Allocator,
    signals: tuple[Signal, ...],
    finishers: tuple[Finisher, ...],
) -> None:
    """What goes with whole groups alone."""
    for spec, finisher in zip(recipe.finishers, finishers, strict=True):
        if finisher.adds_biases:
            raise WrongInput(f"finisher {spec['name']!r} adds biases, paid for with groups; leave them away here")
    if recipe.apart:
        raise WrongInput("apart gives attention and MLP each their share of groups; it goes with structure groups")
    if "scores" in allocator.needs:
        raise WrongInput(f"allocator {recipe.allocator['name']!r} ranks groups; it goes with structure groups")
    for signal in signals:
        if "influence" in signal.needs:
            name = SIGNALS.name_of(signal)
            raise WrongInput(f"signal {name!r} is of whole sub-layers; it goes with structure groups")
    own = form.kept_share
    if own is not None and (recipe.sparsity != float(1 - own) or recipe.of == "model"):
        raise WrongInput(
            f"structure {recipe.structure} removes {float(1 - own):.4g} of the weights of all linear maps in "
            "blocks; leave sparsity and of away, or take structure weights"
        )


def _check_data(recipe: Recipe, pruner: LocalPruner, signals: tuple[Signal, ...]) -> None:
    """Files are there, and a second data set where one is read."""
    readers = {f"pruner {recipe.pruner['name']!r}": pruner} | {f"signal {SIGNALS.name_of(s)!r}": s for s in signals}
    for who, plugin in readers.items():
        if "contrast" in plugin.needs and recipe.data.contrast_dataset is None:
            raise WrongInput(
                f"{who} compares two data sets; give the second with --set data.contrast_dataset=NAME_OR_FILE"
            )
    for dataset in recipe.data.names:
        is_file(dataset)
