"""A suite: what a comparison compares, as YAML. Plain data: recipes, and grids of plug-ins that differ from one.

version: 1
models: [my-model]
sparsity: [0.25, 0.5]
seeds: 3
recipe: default                          # what the grid and the cells differ from
recipes: [fast, flap]                    # whole recipes, each a cell
pruners: [obs, {name: wanda}]            # a grid: every one with every allocator and every objective
allocators: [uniform, table]
objectives: [divergence]
cells: {greedy-short: {allocator: {name: greedy, steps: 4}}}
speed: true                              # time every small model in turns with the dense one; without it: no
set: {data.calibration_tokens: 65536}    # of all cells
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError

from prunekit.errors import WrongInput
from prunekit.recipe.presets import presets, read_yaml
from prunekit.recipe.schema import Recipe, sentence
from prunekit.recipe.specs import OUTWARD, Spec, as_engine, as_specs, outward
from prunekit.system.strict import Strict

SUITES = "prunekit.suites"  # group of entry points
BASELINES = "baselines"  # the suite whose cells every comparison has
AXES = {"pruners": "pruner", "allocators": "allocator", "learners": "learner", "objectives": "objective"}
SHARED = ("version", "model", "sparsity", "family", "of", "metric", "latency", "apart", "structure", "multiple_of",
          "heads", "experts", "experts_share", "data", "seed", "search_budget", "time", "engine", "device", "dtype",
          "memory", "trust_remote_code", "code", "exporters", "samples", "verify")  # fmt: skip
"""Recipe keys that are the comparison's and not the cell's: the model, the price, the text and the machine."""
GROUPS = Recipe.model_fields["structure"].default

Share = Annotated[float, Field(gt=0, lt=1)]
Specs = Annotated[tuple[Spec, ...], BeforeValidator(as_specs)]


@dataclass(frozen=True)
class Cell:
    """What is compared with others: a name, and a recipe that says all that is not the comparison's."""

    name: str
    recipe: Recipe

    def under(self, base: Recipe, sparsity: float, seed: int) -> Recipe:
        """The recipe of this cell for the model, the text, the price and the machine of a base recipe.

        A cell whose recipe makes heads narrower does so here too: what it frees are parameters of the same blocks.

        Raises:
            WrongInput: it removes something else than the comparison does, so that no price would be the same.
        """
        if base.structure == GROUPS != self.recipe.structure:
            raise WrongInput(
                f"{self.name} has structure: {self.recipe.structure}, and this comparison structure: {base.structure}; "
                f"compare such recipes among themselves, with --set structure={self.recipe.structure}"
            )
        shared = {key: getattr(base, key) for key in SHARED} | {"sparsity": sparsity, "seed": seed, "family": ()}
        if self.recipe.heads == "narrow":
            del shared["heads"]
        return self.recipe.model_copy(update=shared)


class Suite(Strict):
    """What is compared, on which models, at which sparsities, how often."""

    version: Literal[1] = 1
    models: Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)] = ()
    sparsity: Annotated[tuple[Share, ...], BeforeValidator(lambda v: (v,) if isinstance(v, float | int) else v)] = (
        0.5,
    )
    seeds: Annotated[int, Field(ge=1)] = 1  # 0, 1, ...
    speed: bool = False  # whether every small model is timed in turns with the dense one
    recipe: str = "default"  # what the grid and the cells differ from
    recipes: tuple[str, ...] = ()
    pruners: Specs = ()
    allocators: Specs = ()
    learners: Specs = ()
    objectives: Specs = ()
    cells: Mapping[str, Mapping[str, Any]] = Field(
        default_factory=dict
    )  # name -> recipe keys; `recipe` is another base
    set: Mapping[str, Any] = Field(default_factory=dict)  # recipe keys of all cells

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """Read a suite.

        Args:
            name: a YAML file, or a preset by name.

        Raises:
            WrongInput: there is no such file or preset, or it says something a suite cannot say.
        """
        found = read_yaml(name, SUITES)
        suite = cls.of_mapping(found)
        if str(name) not in presets(SUITES):
            said = [pair for keys in (suite.set, *suite.cells.values()) for pair in keys.items()]
            said += [(axis, list(getattr(suite, axis))) for axis in AXES]
            for key in (key for slot, value in said for key in _outward(slot, value)):
                raise WrongInput(
                    f"suite {str(name)!r} says {key}; whom to talk to, and with which key, is for the caller to say: "
                    "leave it away there, and give it with --set"
                )
            if suite.set.get("trust_remote_code"):
                raise WrongInput(
                    f"suite {str(name)!r} asks to run code that comes with a model, which only the caller can allow; "
                    "give --trust-remote-code"
                )
        return suite

    @classmethod
    def of_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validate plain values.

        Raises:
            WrongInput: one sentence for the first value that cannot be.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise WrongInput(sentence(error, cls)) from None

    def base(self) -> Recipe:
        """The recipe whose model, text, price and machine all cells have."""
        return _laid_over(Recipe.load(self.recipe), self.set)

    def every_cell(self) -> list[Cell]:
        """The cells that were asked for, and the baselines, each under a name that no other has.

        Raises:
            WrongInput: a recipe or preset does not exist, two cells share a name, or a cell says what is for all.
        """
        asked = [*self._recipes(), *self._grid(), *self._named()]
        there = {cell.name for cell in asked}
        if len(there) < len(asked):
            twice = next(c.name for i, c in enumerate(asked) if c.name in {other.name for other in asked[:i]})
            raise WrongInput(f"two cells are called {twice!r}; give each once, or a name of its own under cells")
        if not asked:
            raise WrongInput("nothing is to be compared; give --recipes, --pruners, --allocators or a suite with cells")
        base = Suite.load(BASELINES).model_copy(update={"recipe": self.recipe})
        cells = [*(cell for cell in base._named() if cell.name not in there), *asked]
        own = {key: value for key, value in self.set.items() if key.split(".")[0] not in SHARED}
        if plugins := [key for key in own if key in AXES.values()]:
            raise WrongInput(
                f"{plugins[0]} is what cells differ in, so it cannot be set for all of them; give it as an axis, as a "
                f"recipe or as a cell, or an option of it as {plugins[0]}.OPTION"
            )
        return [Cell(cell.name, _laid_over(cell.recipe, own)) for cell in cells] if own else cells

    def _recipes(self) -> Iterator[Cell]:
        for name in self.recipes:
            yield Cell(Path(name).stem if Path(name).suffix else name, Recipe.load(name))

    def axes(self) -> list[tuple[str, list[str]]]:
        """The sides of the grid that are named: what is on each, and the plug-ins on it, as cells are named after."""
        return [(side, [_name(spec) for _, spec in axis]) for side, axis in self._axes()]

    def _axes(self) -> list[tuple[str, list[tuple[str, dict[str, Any]]]]]:
        deciders = [("allocator", spec) for spec in self.allocators] + [("learner", spec) for spec in self.learners]
        axes = {
            "pruner": [("pruner", spec) for spec in self.pruners],
            " or ".join(dict.fromkeys(kind for kind, _ in deciders)): deciders,
            "objective": [("objective", spec) for spec in self.objectives],
        }
        return [(side, axis) for side, axis in axes.items() if axis]

    def _grid(self) -> Iterator[Cell]:
        axes = [axis for _, axis in self._axes()]
        if not axes:
            return
        base = Recipe.load(self.recipe)
        for point in product(*axes):
            # naming the plug-in that is there keeps its options, as everywhere
            chosen = {key: spec["name"] if len(spec) == 1 else spec for key, spec in point}
            yield Cell(cell_of([_name(spec) for _, spec in point]), base.with_overrides(chosen))

    def _named(self) -> Iterator[Cell]:
        for name, keys in self.cells.items():
            own = {key: value for key, value in keys.items() if key != "recipe"}
            if foreign := [key for key in own if key.split(".")[0] in SHARED]:
                raise WrongInput(
                    f"cell {name!r} says {foreign[0]}, which all cells share; leave it away there, or give it for all"
                )
            yield Cell(name, Recipe.load(keys.get("recipe", self.recipe)).with_overrides(own))


def _laid_over(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with what is set for all, but for what is taken over of a learner where none decides."""
    there = recipe.learner is not None or any(key.split(".")[0] == "learner" for key in values)
    return recipe.with_overrides({key: value for key, value in values.items() if there or key != "learned"})


def cell_of(names: Sequence[str]) -> str:
    """The name of a cell of the grid, by its plug-ins, one of every side."""
    return " + ".join(names)


def _outward(key: str, value: Any) -> list[str]:
    """The keys of what a recipe key says of whom to talk to: itself, an engine by its address, or options in it."""
    if key.rpartition(".")[2] in OUTWARD:
        return [key]
    return [*outward(as_engine(value) if key == "engine" else value, key)]


def _name(spec: Mapping[str, Any]) -> str:
    """Of a plug-in with its options: tyr(stride=0.25)."""
    options = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}({options})" if options else str(spec["name"])
