"""A recipe: every choice that makes a pruned model, validated, as YAML. Plain data: it knows no plug-in.

A recipe file says what differs from the preset `default`; a preset is a YAML file in a package that an
entry point of the group `prunekit.recipes` names. `resolve` builds what a recipe names; the recipe beside a result has
every choice in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from prunekit.data.spec import TAGS, DataSpec, TextSpec
from prunekit.errors import WrongInput, unknown
from prunekit.recipe.overrides import expand_target, override, split_family
from prunekit.recipe.presets import beside, laid_over, presets, read_yaml
from prunekit.recipe.specs import SpareSpec, Spec, as_engine, as_pattern, as_specs, outward, own_share
from prunekit.space.latency import LatencySpec
from prunekit.space.prices import FILE
from prunekit.system.strict import Strict
from prunekit.system.times import as_seconds

TIMED = frozenset({"calibration_tokens", "evaluation_tokens"})  # what a time chooses; a search has those it needs


class Recipe(Strict):
    """What to prune, how far, with which parts and on which text."""

    version: Literal[1] = 1
    model: str | None = None  # folder or hub id; None in presets
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of `of` that is removed
    family: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()  # sparsities it was searched with; (): alone
    of: Literal["blocks", "model"] = "blocks"
    metric: str | dict[str, Any] = "parameters"  # `target: METRIC=SHARE` says it together with a sparsity of 1 - SHARE
    latency: LatencySpec = LatencySpec()  # the options of metric latency
    apart: bool = False  # attention and MLP get `sparsity` each and do not trade
    spare: SpareSpec = SpareSpec()  # blocks that stay whole; the others lose so much more
    structure: Annotated[str, BeforeValidator(as_pattern)] = "groups"  # or weights, or N:M, which says the sparsity
    multiple_of: Annotated[int, Field(ge=1)] = 1  # counts of neurons, where some of them go
    heads: Literal["kv", "query", "narrow"] = (
        "kv"  # a group: a KV head with its query heads, or query heads of every KV
    )
    # head; narrow: all stay, queries and keys become maps of low rank, and values get narrower
    experts: Literal["whole", "neurons", "both"] = "whole"  # a group: an expert, or neurons of every expert of a layer
    experts_share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of what is removed, by whole experts first, with both
    pruner: Spec
    allocator: Spec | None
    learner: Spec | None = None  # in the place of an allocator: which groups are kept, and so how many
    learned: Literal["weights", "groups", "counts"] | None = None  # what is taken over; None: all that it learns
    width: Spec | None = None  # what narrows the residual stream first, by its share of what is removed
    objective: Spec
    finishers: Annotated[tuple[Spec, ...], BeforeValidator(as_specs)] = ()  # in this order; one may stand alone
    carry: Literal["dense", "centre", "expected"] = "expected"  # activations that reach the next block
    rebuild: bool = True  # prune once more around the answer
    damping: Annotated[float, Field(ge=0)] = 0.01  # ridge, as a share of the mean of diag H
    search_budget: Annotated[int, Field(gt=0)] | None = None  # token-forwards
    time: Annotated[float | None, BeforeValidator(as_seconds)] = None  # in all, as 45m; None: as long as it takes
    data: DataSpec = DataSpec()
    seed: Annotated[int, Field(ge=0)] = 0
    engine: Annotated[Spec, BeforeValidator(as_engine)] = Field(default={"name": "local"})  # where the work is done
    device: str = "auto"  # several by comma: the work that can be shared out is
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # of the computation
    memory: str | int = "auto"  # bytes to get along with, as 8GiB; auto: what the machine has to spare
    trust_remote_code: bool = False  # a file that says so is refused, unless the caller says it too
    code: Literal["import", "bundled"] = "import"  # how a result of uneven sizes finds its classes
    exporters: Annotated[tuple[Spec, ...], BeforeValidator(as_specs)] = ({"name": "hf"},)  # what the result is saved as
    samples: Annotated[int, Field(ge=0, le=10)] = 0  # prompts that both models continue, for the report
    verify: bool = True  # load the result in a fresh process and compare
    _from_file: frozenset[str] = PrivateAttr(frozenset())  # options of `OUTWARD` that a file says, and no caller
    _proposed: frozenset[str] = PrivateAttr(frozenset())  # amounts of text that a preset says, and no caller

    @model_validator(mode="before")
    @classmethod
    def _patterns_say_the_sparsity(cls, values: Any) -> Any:
        if isinstance(values, dict) and "sparsity" not in values:
            share = own_share(as_pattern(values.get("structure")))
            return values if share is None else values | {"sparsity": float(1 - share)}
        return values

    @model_validator(mode="after")
    def _one_decides(self) -> Self:
        if (self.allocator is None) == (self.learner is None):
            raise WrongInput("an allocator or a learner decides how much is kept where; give one of them")
        return self

    @classmethod
    def load(cls, name: str | Path = "default", *, trust_remote_code: bool = False) -> Self:
        """Read a recipe.

        Args:
            name: a YAML file, the folder of a pruned model, or a preset by name.
            trust_remote_code: whether it may ask for code of a model to be run; a file cannot allow that itself.

        Raises:
            WrongInput: there is no such file or preset, or it says something a recipe cannot say.
        """
        found, default = read_yaml(name), read_yaml("default")
        if str(name) not in presets():
            path = Path(name).expanduser()
            priced = {key: found[key] for key in ("latency", "metric") if isinstance(found.get(key), dict)}
            found |= {key: beside(part, path if path.is_dir() else path.parent) for key, part in priced.items()}
        recipe = cls.of_mapping(found if name == "default" else laid_over(default, found))
        if str(name) in presets():
            recipe._proposed = TIMED & set(found.get("data", {}))
        else:
            recipe._from_file = frozenset(recipe.outward)
        if recipe.trust_remote_code and not trust_remote_code:
            raise WrongInput(
                f"recipe {str(name)!r} asks to run code that comes with the model, which only the caller can allow; "
                "give --trust-remote-code or trust_remote_code=True, or --set trust_remote_code=false to go without"
            )
        return recipe

    @classmethod
    def of_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validate plain values.

        Args:
            values: by key; `target` among them stands for metric and sparsity.

        Raises:
            WrongInput: one sentence for the first value that cannot be.
        """
        try:
            return cls.model_validate(expand_target(values))
        except ValidationError as error:
            raise WrongInput(sentence(error)) from None

    def as_told(self) -> dict[str, Any]:
        """Write it for another process of this machine, which `of_told` gives it back to."""
        return {"values": self.model_dump(mode="json"), "from_file": sorted(self._from_file)}

    @classmethod
    def of_told(cls, told: Mapping[str, Any]) -> Self:
        """Read what `as_told` has written: who has said what is kept."""
        recipe = cls.of_mapping(told["values"])
        recipe._from_file = frozenset(told["from_file"])
        return recipe

    def with_overrides(self, overrides: Mapping[str, Any]) -> Self:
        """Replace values.

        Naming the plug-in that is there already keeps its options. Digests of tokens go with the data they are of,
        a table of prices goes with its model, workload and device. Amounts of text that a preset proposes make way for
        a time, which chooses them.

        Args:
            overrides: dotted key -> plain value: sparsity, pruner, pruner.refit, data.seqlen,
                allocator.inner.generations. What options a plug-in has, `resolve` knows.

        Raises:
            WrongInput: no such key, with the nearest; or no such value.
        """
        proposed = self._proposed - {key.removeprefix("data.") for key in overrides}
        free = {f"data.{key}": None for key in proposed} if overrides.get("time") is not None else {}
        found = self.of_mapping(override(self.model_dump(mode="python"), {**free, **overrides}))
        found._proposed = frozenset() if free else proposed
        said = (outward(as_engine(value) if key == "engine" else value, key) for key, value in overrides.items())
        found._from_file = self._from_file.difference(*said)
        return found

    def spread(self, overrides: Mapping[str, Any]) -> Self | None:
        """As `with_overrides`, of a list of sparsities or a target of several shares.

        Returns:
            The recipe of the smallest sparsity, which names its family; None: there is no list.

        Raises:
            WrongInput: as `with_overrides`, of any value; or one is given twice.
        """
        if (several := split_family(overrides)) is None:
            return None
        recipes = sorted((self.with_overrides(each) for each in several), key=lambda recipe: recipe.sparsity)
        family = tuple(recipe.sparsity for recipe in recipes)
        if not family:
            raise WrongInput("sparsity has no value; give one, or several of a family")
        if twice := [one for one, other in pairwise(family) if one == other]:
            raise WrongInput(f"sparsity {twice[0]} is given twice; every member of a family has its own")
        return recipes[0].model_copy(update={"family": family if len(family) > 1 else ()})

    @property
    def members(self) -> list[Self]:
        """The recipes of the family, by ascending sparsity; this one where it has none."""
        return [self.model_copy(update={"sparsity": sparsity}) for sparsity in self.family] or [self]

    @property
    def inside(self) -> Literal["whole", "neurons"]:
        """What of a mixture of experts the sites of the last step are of."""
        return "whole" if self.experts == "whole" else "neurons"

    @property
    def sections(self) -> dict[str, LatencySpec]:
        """Options of metrics that are sections of their own, by the metric's name."""
        return {key: value for key, value in self if isinstance(value, LatencySpec)}

    @property
    def metric_spec(self) -> dict[str, Any]:
        """The metric with its options, those in a section of its name among them."""
        spec = {"name": self.metric} if isinstance(self.metric, str) else self.metric
        section = self.sections.get(str(spec.get("name")))
        return spec if section is None else section.model_dump() | spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()  # whoever said it

    __hash__ = None  # type: ignore[assignment]  it holds mappings

    @property
    def outward(self) -> dict[str, tuple[Any, Any]]:
        """Whom plug-ins talk to, and with which key: dotted key -> (name of the plug-in, value)."""
        return {k: v for slot, value in self.model_dump(mode="python").items() for k, v in outward(value, slot).items()}

    @property
    def from_file(self) -> frozenset[str]:
        """The keys of `outward` that a file says, and no caller."""
        return self._from_file

    @property
    def unsaid(self) -> frozenset[str]:
        """Keys that need not be written."""
        there = {
            "family": self.family, "spare": self.spare != SpareSpec(), "learner": self.learner, "learned": self.learner,
            "width": self.width, "multiple_of": self.multiple_of > 1, "experts": self.experts != "whole",
            "experts_share": self.experts == "both",
        }  # fmt: skip
        return frozenset(key for key, value in there.items() if not value)

    def to_yaml(self) -> str:
        """Write all values in the order of the class, below a comment with the versions that were used.

        A price table is a file beside the recipe. Options of plug-ins are those that are given;
        `resolve(recipe).recipe` has all of them.
        """
        used = ", ".join(f"{name} {metadata.version(name)}" for name in ("prunekit", "torch", "transformers"))
        values = self.model_dump(mode="json", exclude=set(self.unsaid))
        for part in (values["latency"], values["metric"]):
            if isinstance(part, dict) and part.get("prices") is not None:
                part["prices"] = FILE
        body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        return f"# {used}\n{body}"


# -- saying what is wrong -----------------------------------------------------------------------------


def sentence(error: ValidationError, of: type[Strict] = Recipe) -> str:
    """Say in one sentence what is wrong first.

    Args:
        error: of values for a recipe, or for what else is written as one.
        of: the class that they are for.
    """
    what = of.__name__.lower()
    first = error.errors()[0]
    *path, last = [str(part) for part in first["loc"] if part not in TAGS] or [what]
    key, kind, context = ".".join([*path, last]), first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        parts = {"data": TextSpec if path[2:] else DataSpec, "latency": LatencySpec}
        fields = (parts.get(path[0], of) if path else of).model_fields
        return unknown(f"{what} key", key, [".".join([*path, name]) for name in fields])
    if kind == "missing":
        return f"the {what} has no {key}; take it from a preset or add it"
    if kind == "literal_error":
        return f"{key} is one of {context['expected']}, not {first['input']!r}"
    if isinstance(context.get("error"), WrongInput):  # it says all
        return f"{key}: {context['error']}" if path or key != what else str(context["error"])
    if kind in ("greater_than", "less_than") and key == "sparsity":
        return f"sparsity is the share that is removed, more than 0 and less than 1, not {first['input']}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
