"""A recipe: every choice that makes a pruned model, validated, as YAML.

A recipe file says what differs from the preset `default`; a preset is a YAML file in a package that an
entry point of the group `prunekit.recipes` names. The recipe beside a result has every choice in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from prunekit.errors import WrongInput, unknown
from prunekit.space.budgets import Metric
from prunekit.space.forms import parse_form
from prunekit.space.prices import FILE

if TYPE_CHECKING:
    from prunekit.data.draws import Draws
    from prunekit.plugins.allocator import Allocator
    from prunekit.plugins.finisher import Finisher
    from prunekit.plugins.pruner import LocalPruner
    from prunekit.plugins.signal import Signal
from prunekit.data.spec import TAGS, DataSpec, TextSpec, as_texts, names_of
from prunekit.recipe.overrides import put
from prunekit.recipe.parts import Spec, as_engine
from prunekit.recipe.presets import beside, laid_over, presets, read_yaml
from prunekit.space.latency import LatencySpec
from prunekit.system.strict import Strict

WITHOUT_EFFECT = frozenset(
    {"version", "engine", "device", "memory", "code", "verify", "trust_remote_code"}
)  # on the weights that come out


def _as_pattern(value: Any) -> Any:
    """YAML 1.1 reads 2:4 as 2 · 60 + 4."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) and value > 60 else value


def _own_share(structure: Any) -> Fraction | None:
    """The share that the form keeps by itself; None: any."""
    try:
        return parse_form(structure).kept_share if isinstance(structure, str) else None
    except WrongInput:  # said where the recipe is checked
        return None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, Mapping)) else value


def _targeted(values: Mapping[str, Any]) -> dict[str, Any]:
    """A target as what it is short for: a metric, and the sparsity that keeps its share.

    Raises:
        WrongInput: it is no target, or stands beside what it says.
    """
    rest = dict(values)
    target = rest.pop("target", None)
    if target is None:
        return rest
    if beside := [key for key in ("sparsity", "metric") if key in rest]:
        raise WrongInput(
            f"target says which metric keeps how much, so {' and '.join(beside)} cannot be given too; "
            "--sparsity 0.4 is the same as --target parameters=0.6"
        )
    pairs = target.items() if isinstance(target, Mapping) else [str(target).partition("=")[::2]]
    if len(pairs) != 1:
        raise WrongInput(f"a target is one METRIC=SHARE, as in latency=0.6, not {target!r}")
    ((metric, text),) = pairs
    if metric not in get_args(Metric):
        raise WrongInput(unknown("metric", str(metric), get_args(Metric)) + "; a target is as in latency=0.6")
    try:
        share = Fraction(str(text))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        raise WrongInput(f"target {metric} is the share that stays, more than 0 and less than 1, not {text!r}")
    return rest | {"metric": metric, "sparsity": float(1 - share)}


class Recipe(Strict):
    """What to prune, how far, with which parts and on which text."""

    version: Literal[1] = 1
    model: str | None = None  # folder or hub id; None in presets
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of `of` that is removed
    family: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()  # sparsities it was searched with; (): alone
    of: Literal["blocks", "model"] = "blocks"
    metric: Metric = "parameters"  # `target: METRIC=SHARE` says it together with a sparsity of 1 - SHARE
    latency: LatencySpec = LatencySpec()  # of metric latency
    apart: bool = False  # attention and MLP get `sparsity` each and do not trade
    structure: Annotated[str, BeforeValidator(_as_pattern)] = "groups"  # or weights, or N:M, which says the sparsity
    heads: Literal["kv", "query"] = "kv"  # a group: a KV head with its query heads, or query heads of every KV head
    pruner: Spec
    allocator: Spec
    objective: Spec
    finishers: Annotated[tuple[Spec, ...], BeforeValidator(_as_list)] = ()  # in this order; one may stand alone
    carry: Literal["dense", "centre", "expected"] = "expected"  # activations that reach the next block
    rebuild: bool = True  # prune once more around the answer
    damping: Annotated[float, Field(ge=0)] = 0.01  # ridge, as a share of the mean of diag H
    search_budget: Annotated[int, Field(gt=0)] | None = None  # token-forwards
    data: DataSpec = DataSpec()
    seed: Annotated[int, Field(ge=0)] = 0
    engine: Annotated[Spec, BeforeValidator(as_engine)] = Field(default={"name": "local"})  # where the work is done
    device: str = "auto"  # several by comma: the work that can be shared out is
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of the computation
    memory: str | int = "auto"  # bytes to get along with, as 8GiB; auto: what the machine has to spare
    trust_remote_code: bool = False
    code: Literal["import", "bundled"] = "import"  # how a result of uneven sizes finds its classes
    verify: bool = True  # load the result in a fresh process and compare

    @model_validator(mode="before")
    @classmethod
    def _patterns_say_the_sparsity(cls, values: Any) -> Any:
        if isinstance(values, dict) and "sparsity" not in values:
            share = _own_share(_as_pattern(values.get("structure")))
            return values if share is None else values | {"sparsity": float(1 - share)}
        return values

    @classmethod
    def load(cls, name: str | Path = "default") -> Self:
        """A recipe from a YAML file, from the folder of a pruned model, or a preset by name.

        Raises:
            WrongInput: there is no such file or preset, or it says something a recipe cannot say.
        """
        found = read_yaml(name, presets(), "recipe")
        default = yaml.safe_load(presets()["default"])
        if str(name) not in presets() and isinstance(found.get("latency"), dict):
            path = Path(name).expanduser()
            found["latency"] = beside(found["latency"], path if path.is_dir() else path.parent)
        return cls.of_mapping(found if name == "default" else laid_over(default, found))

    @classmethod
    def of_mapping(cls, values: Mapping[str, Any]) -> Self:
        """A recipe from plain values; `target` among them stands for metric and sparsity.

        Raises:
            WrongInput: one sentence for the first value that cannot be.
        """
        try:
            return cls.model_validate(_targeted(values))
        except ValidationError as error:
            raise WrongInput(_sentence(error)) from None

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """Replace values by dotted key: sparsity, pruner, data.seqlen, allocator.inner.generations.

        Naming the plug-in that is there already keeps its options. Digests of tokens go with the data they are of,
        a table of prices goes with its model, workload and device.

        Raises:
            WrongInput: no such key, with the nearest; or no such value.
        """
        values, overrides = self.model_dump(mode="python"), _targeted(overrides)
        if "latency.prices" not in overrides and self._is_other_to_time(overrides):
            values["latency"]["prices"] = None
        if as_texts(overrides.get("data.dataset", before := values["data"]["dataset"])) != before:
            forgotten = ["config", "split"]  # they are of the other data set
            if self.data.evaluation_dataset is None or names_of(self.data.evaluation_dataset) == names_of(
                self.data.dataset
            ):
                forgotten += ["evaluation_dataset", "evaluation_split"]
            values["data"] |= dict.fromkeys(forgotten)
        structure = _as_pattern(overrides.get("structure", self.structure))
        if (
            "sparsity" not in overrides
            and structure != self.structure
            and (_own_share(structure) or _own_share(self.structure))
        ):
            values.pop("sparsity")  # a pattern has its own; what follows one has the default
            values["family"] = ()
        if "sparsity" in overrides:
            values["family"] = ()  # it was of the other
        for key in sorted(overrides, key=lambda key: key.count(".")):  # a plug-in before its options
            put(values, key, overrides[key])
            if key.split(".")[0] in ("data", "model", "seed") and isinstance(values["data"], dict):
                values["data"]["digests"] = None
        return type(self).of_mapping(values)

    def spread(self, overrides: Mapping[str, Any]) -> Self | None:
        """As `with_overrides`, of a list of sparsities or a target of several shares: the first recipe of the family.

        None: they give one value.

        Raises:
            WrongInput: as `with_overrides`, of any value; or one is given twice.
        """
        key = "target" if "target" in overrides else "sparsity"
        metric, equals, shares = str(overrides.get(key)).partition("=")
        if key == "target" and "," in shares:
            values = [f"{metric}{equals}{share}" for share in shares.split(",")]
        elif isinstance(overrides.get("sparsity"), (list, tuple)):
            values = overrides["sparsity"]
        else:
            return None
        recipes = [self.with_overrides({**overrides, key: value}) for value in values]
        family = sorted(recipe.sparsity for recipe in recipes)
        if not family:
            raise WrongInput("sparsity has no value; give one, or several of a family")
        if twice := [one for one, other in pairwise(family) if one == other]:
            raise WrongInput(f"sparsity {twice[0]} is given twice; every member of a family has its own")
        first = next(recipe for recipe in recipes if recipe.sparsity == family[0])
        return first.model_copy(update={"family": tuple(family) if len(family) > 1 else ()})

    @property
    def members(self) -> list[Self]:
        """The recipes of the family, by ascending sparsity; this one where it has none."""
        return [self.model_copy(update={"sparsity": sparsity}) for sparsity in self.family] or [self]

    def _is_other_to_time(self, overrides: Mapping[str, Any]) -> bool:
        """Whether overrides change what a price table was measured on, where that was said."""
        keys = ("model", "heads", "device", "dtype")
        now = {key: getattr(self, key) for key in keys} | {f"latency.{k}": v for k, v in self.latency}
        return any(now.get(key) not in (None, value) for key, value in overrides.items() if key in now) or (
            "latency" in overrides
        )

    def checked(self) -> Self:
        """This recipe with every option of every plug-in written out.

        Raises:
            WrongInput: a name, option or value that does not exist, or a file that is not there.
        """
        from prunekit.data.sources import is_file
        from prunekit.plugins.pruner import LocalPruner
        from prunekit.plugins.registry import ALLOCATORS, ENGINES, FINISHERS, OBJECTIVES, PRUNERS, SIGNALS, signals_of

        if self.apart and self.of == "model":
            raise WrongInput(
                "apart gives attention and MLP each their share of the blocks; it does not go with of=model"
            )
        if self.family and (list(self.family) != sorted({*self.family, self.sparsity}) or len(self.family) < 2):
            raise WrongInput(
                f"family names all sparsities that were searched together, this recipe's {self.sparsity} too, "
                f"ascending, not {list(self.family)}"
            )
        pruner = PRUNERS.build(self.pruner)
        finishers = [FINISHERS.build(spec) for spec in self.finishers]
        allocator = ALLOCATORS.build(self.allocator)
        signals = signals_of(allocator)  # a name that does not exist is met here
        if "scores" in allocator.needs and type(pruner).scores is LocalPruner.scores:
            raise WrongInput(
                f"allocator {self.allocator['name']!r} ranks groups by the pruner's scores, and pruner "
                f"{self.pruner['name']!r} has none; choose another of either"
            )
        self._check_structure(pruner, allocator, signals, finishers)
        readers = {f"pruner {self.pruner['name']!r}": pruner} | {f"signal {SIGNALS.name_of(s)!r}": s for s in signals}
        for who, plugin in readers.items():
            if "contrast" in plugin.needs and self.data.contrast_dataset is None:
                raise WrongInput(
                    f"{who} compares two data sets; give the second with --set data.contrast_dataset=NAME_OR_FILE"
                )
        for dataset in self.data.names:
            is_file(dataset)
        table = self.latency.table if self.metric == "latency" else None
        unpriced = self.latency.model_copy(update={"prices": None})
        return self.model_copy(
            update={
                "latency": unpriced if table is None else self.latency.measured(table),
                "pruner": PRUNERS.spec(pruner),
                "allocator": ALLOCATORS.spec(allocator),
                "objective": OBJECTIVES.spec(OBJECTIVES.build(self.objective)),
                "finishers": tuple(map(FINISHERS.spec, finishers)),
                "engine": ENGINES.spec(ENGINES.build(self.engine)),
            }
        )

    def _check_structure(
        self, pruner: LocalPruner, allocator: Allocator, signals: Sequence[Signal], finishers: Sequence[Finisher]
    ) -> None:
        """Every part must know what is removed."""
        from prunekit.plugins.registry import SIGNALS

        structure = parse_form(self.structure)
        own = structure.kept_share
        if own is not None and self.family:
            raise WrongInput(
                f"structure {self.structure} says its own sparsity, so there is no family of several; "
                "take structure groups or weights"
            )
        named = [("pruner", self.pruner, pruner)]
        named += [("finisher", spec, each) for spec, each in zip(self.finishers, finishers, strict=True)]
        for kind, spec, plugin in named:
            if structure.units not in plugin.structures:
                there = ", ".join(sorted(plugin.structures))
                raise WrongInput(f"{kind} {spec['name']!r} does not know structure {structure.units}; it knows {there}")
        if structure.shrinks:
            return
        if self.metric == "latency":
            raise WrongInput(
                "zeros are multiplied like other numbers and save no time; latency goes with structure groups"
            )
        for spec, finisher in zip(self.finishers, finishers, strict=True):
            if finisher.adds_biases:
                raise WrongInput(f"finisher {spec['name']!r} adds biases, paid for with groups; leave them away here")
        if self.apart:
            raise WrongInput("apart gives attention and MLP each their share of groups; it goes with structure groups")
        if "scores" in allocator.needs:
            raise WrongInput(f"allocator {self.allocator['name']!r} ranks groups; it goes with structure groups")
        for signal in signals:
            if "influence" in signal.needs:
                name = SIGNALS.name_of(signal)
                raise WrongInput(f"signal {name!r} is of whole sub-layers; it goes with structure groups")
        if own is not None and (self.sparsity != float(1 - own) or self.of == "model"):
            raise WrongInput(
                f"structure {self.structure} removes {float(1 - own):.4g} of the weights of all linear maps in "
                "blocks; leave sparsity and of away, or take structure weights"
            )

    @property
    def _unsaid(self) -> set[str]:
        """What a recipe need not say."""
        return set() if self.family else {"family"}

    def completed(self, *, model: str, draws: Draws) -> Self:
        """This recipe with the model's name and every choice about the tokens written in."""
        return self.model_copy(update={"model": model, "data": draws.spec})

    def to_yaml(self) -> str:
        """All values in the order of the class, below a comment with the versions that were used.

        A price table is a file beside the recipe.
        """
        used = ", ".join(f"{name} {metadata.version(name)}" for name in ("prunekit", "torch", "transformers"))
        values = self.checked().model_dump(mode="json", exclude=self._unsaid)
        if values["latency"]["prices"] is not None:
            values["latency"]["prices"] = FILE
        body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        return f"# {used}\n{body}"

    @property
    def digest(self) -> str:
        """sha256 of what determines the weights; neither device nor packaging does (`WITHOUT_EFFECT`)."""
        return hashlib.sha256(json.dumps(self.determining(), sort_keys=True).encode()).hexdigest()

    def determining(self) -> dict[str, Any]:
        """The values that determine the weights, every option of every plug-in among them."""
        unread = self._unsaid | WITHOUT_EFFECT | (set() if self.metric == "latency" else {"latency"})
        return self.checked().model_dump(mode="json", exclude=unread)


# -- saying what is wrong -----------------------------------------------------------------------------


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    *path, last = [str(part) for part in first["loc"] if part not in TAGS] or ["recipe"]
    key, kind, context = ".".join([*path, last]), first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        parts = {"data": TextSpec if path[2:] else DataSpec, "latency": LatencySpec}
        fields = (parts.get(path[0], Recipe) if path else Recipe).model_fields
        return unknown("recipe key", key, [".".join([*path, name]) for name in fields])
    if kind == "missing":
        return f"the recipe has no {key}; take it from a preset or add it"
    if kind == "literal_error":
        return f"{key} is one of {context['expected']}, not {first['input']!r}"
    if kind in ("greater_than", "less_than") and key == "sparsity":
        return f"sparsity is the share that is removed, more than 0 and less than 1, not {first['input']}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
