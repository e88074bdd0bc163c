"""What `prunekit tune` may choose: a YAML file that maps recipe keys to values, ranges and choices.

damping: {low: 1e-3, high: 0.1, log: true}        a range; of integers where both ends are
carry: [dense, expected]                          a list is always a choice
pruner: [wanda, {name: obs, aim: [own, stream]}]  a plug-in may have ranges and choices among its options
rebuild: false                                    a value is taken as it is
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import WrongInput
from prunekit.recipe.presets import presets, read_yaml
from prunekit.recipe.schema import Recipe
from prunekit.recipe.specs import outward

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

SPACES = "prunekit.spaces"  # group of entry points
SETTLED = ("version", "model", "structure", "seed", "device", "dtype", "memory", "trust_remote_code", "code", "verify")
TEXT = ("data.dataset", "data.calibration_tokens", "data.calibration_draw")  # what may be tuned of `data`


@dataclass(frozen=True)
class Value:
    """Nothing to choose."""

    value: Any

    def suggested(self, trial: BaseTrial, name: str) -> Any:
        return self.value

    def examples(self) -> list[Any]:
        return [self.value]


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; integers where both are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def suggested(self, trial: BaseTrial, name: str) -> Any:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def examples(self) -> list[Any]:
        return [self.low, self.high]


@dataclass(frozen=True)
class Plugin:
    """A plug-in by name, with nodes for options."""

    name: str
    options: Mapping[str, Node]

    def suggested(self, trial: BaseTrial, name: str) -> Any:
        chosen = {key: node.suggested(trial, f"{name}.{self.name}.{key}") for key, node in self.options.items()}
        return {"name": self.name, **chosen}

    def examples(self) -> list[Any]:
        return list(_each({"name": Value(self.name), **self.options}))


@dataclass(frozen=True)
class Choice:
    """One of several, each with a label that no other has."""

    options: Mapping[str | float | None, Node]

    def suggested(self, trial: BaseTrial, name: str) -> Any:
        return self.options[trial.suggest_categorical(name, list(self.options))].suggested(trial, name)

    def examples(self) -> list[Any]:
        return [example for node in self.options.values() for example in node.examples()]


Node = Value | Range | Plugin | Choice


@dataclass(frozen=True)
class Choices:
    """Recipe keys and what there is to choose for each."""

    source: Mapping[str, Any]  # as it was read, to tell whether a study is of this space
    nodes: Mapping[str, Node]

    @classmethod
    def load(cls, name: str | Path) -> Choices:
        """Read a space.

        Args:
            name: a YAML file, or a preset by name.

        Raises:
            WrongInput: there is no such file or preset, or it says something a space cannot say.
        """
        found = read_yaml(name, SPACES)
        if str(name) not in presets(SPACES):
            for key in (key for slot, value in found.items() for key in outward(value, slot)):
                raise WrongInput(
                    f"space {str(name)!r} says {key}; whom to talk to, and with which key, is for the caller to say: "
                    f"leave it away there, and give --set {key.split('.')[0]}.{key.split('.')[-1]}=..."
                )
        return cls.of_mapping(found)

    @classmethod
    def of_mapping(cls, source: Mapping[str, Any]) -> Choices:
        """Read plain values.

        Args:
            source: recipe keys with their choices.

        Raises:
            WrongInput: one sentence for the first value that cannot be.
        """
        nodes = {key: _node(value, key) for key, value in source.items()}
        for key, node in nodes.items():
            slot = key.split(".")[0]
            if slot in SETTLED or (slot == "data" and key not in TEXT and not isinstance(node, Value)):
                raise WrongInput(
                    f"{key} cannot be tuned: trials share model, machine and the text they are compared on; "
                    f"of the data there are {', '.join(TEXT)}"
                )
        if all(isinstance(node, Value) for node in nodes.values()):
            raise WrongInput("the space leaves nothing to choose; give some key a list, or a low and a high")
        return cls(dict(source), nodes)

    @property
    def fixed(self) -> dict[str, Any]:
        """What holds for every trial."""
        return {key: node.value for key, node in self.nodes.items() if isinstance(node, Value)}

    @property
    def open(self) -> dict[str, Node]:
        """What is chosen for each."""
        return {key: node for key, node in self.nodes.items() if not isinstance(node, Value)}

    def suggested(self, trial: BaseTrial) -> dict[str, Any]:
        """Ask a trial for a value of everything that is open.

        Args:
            trial: is asked for parameters by their path: pruner.obs.aim.

        Returns:
            Recipe key -> value.
        """
        return {key: node.suggested(trial, key) for key, node in self.open.items()}

    def check(self, recipe: Recipe) -> None:
        """Resolve a recipe with every choice once, beside the first of all others.

        Args:
            recipe: to be tuned.

        Raises:
            WrongInput: a recipe cannot say so.
        """
        from prunekit.recipe.resolve import resolve  # which loads plug-ins

        for overrides in _each(self.open):
            resolve(recipe.with_overrides(overrides))


def _each(nodes: Mapping[str, Node]) -> Iterator[dict[str, Any]]:
    """Every example of every node, beside the first examples of the others."""
    examples = {key: node.examples() for key, node in nodes.items()}
    first = {key: found[0] for key, found in examples.items()}
    yield first
    for key, found in examples.items():
        for example in found[1:]:
            yield first | {key: example}


def _node(value: Any, key: str) -> Node:
    if isinstance(value, Mapping):
        return _plugin(value, key) if "name" in value else _range(value, key)
    if not isinstance(value, list):
        return Value(value)
    if not value:
        raise WrongInput(f"{key}: a list of choices is empty")
    # a list among choices is a value: selections: [[[4, 512]], [[8, 512]]]
    nodes = [Value(item) if isinstance(item, list) else _node(item, key) for item in value]
    if len(nodes) == 1:
        return nodes[0]
    labels = [_label(item) for item in value]
    if twice := [label for i, label in enumerate(labels) if label in labels[:i]]:
        raise WrongInput(f"{key}: {twice[0]!r} is given twice; make it one, with choices among its options")
    return Choice(dict(zip(labels, nodes, strict=True)))


def _label(item: Any) -> str | float | None:
    if isinstance(item, Mapping):
        return str(item.get("name", item))
    return str(item) if isinstance(item, (list, bool)) else item


def _plugin(value: Mapping[str, Any], key: str) -> Node:
    options = {name: _node(option, f"{key}.{name}") for name, option in value.items() if name != "name"}
    if all(isinstance(node, Value) for node in options.values()):
        return Value({"name": value["name"]} | {name: node.examples()[0] for name, node in options.items()})
    return Plugin(str(value["name"]), options)


def _range(value: Mapping[str, Any], key: str) -> Range:
    if not {"low", "high"} <= value.keys() <= {"low", "high", "log", "step"}:
        raise WrongInput(
            f"{key}: {dict(value)} is neither a range {{low: ..., high: ..., log: ..., step: ...}} nor a plug-in "
            "{name: ..., option: ...}"
        )
    low, high, log, step = value["low"], value["high"], bool(value.get("log")), value.get("step")
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in (low, high, 1 if step is None else step)):
        raise WrongInput(f"{key}: low, high and step are numbers, not {dict(value)}; YAML reads 1e-3 as text: 1.0e-3")
    if not low < high or (log and low <= 0) or (step is not None and (step <= 0 or log)):
        raise WrongInput(
            f"{key}: low is below high, above 0 with log, and step is positive and not with log, not {dict(value)}"
        )
    return Range(low, high, log, step)
