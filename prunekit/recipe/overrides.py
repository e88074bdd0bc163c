"""Overrides: KEY=VALUE replaces one value of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from prunekit.errors import WrongInput, unknown
from prunekit.recipe.parts import as_engine


def parsed(assignment: str) -> tuple[str, Any]:
    """`key.path=value`, the value as YAML.

    Raises:
        WrongInput: it is not of that form.
    """
    key, equals, value = assignment.partition("=")
    if not (key.strip() and equals):
        raise WrongInput(f"--set takes key.path=value, not {assignment!r}; as in --set pruner.refit=true")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise WrongInput(f"--set {key.strip()}: {value!r} is not a YAML value; quote it") from None


# -- overriding ---------------------------------------------------------------------------------------


def put(values: dict[str, Any], key: str, value: Any) -> None:
    slot, *path = key.split(".")
    if slot not in values:
        raise WrongInput(unknown("recipe key", slot, values))
    if slot == "finishers":
        values[slot] = _finishers(values[slot], path, value)
        return
    if (registry := _registries().get(slot)) is not None:
        if path:
            values[slot] = registry.spec(registry.build(values[slot]))  # so that every option is there to be set
        elif isinstance(value, registry.contract):
            value = registry.spec(value)
        elif slot == "engine":
            value = as_engine(value)
    if key in ("data", "latency") and isinstance(value, Mapping):
        value = {**values[key], **value}
    _put(values, [slot, *path], value)


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Replace what is at the end of a path."""
    here, name = values, path[0]
    for step in path[1:]:
        here, parent, name = here[name], name, step
        if not isinstance(here, dict) or name not in here:
            there = [f"{parent}.{option}" for option in here] if isinstance(here, dict) else []
            raise WrongInput(unknown("recipe key", f"{parent}.{name}", there))
    old = here[name]
    if isinstance(value, str) and isinstance(old, dict) and "name" in old:
        value = old if old["name"] == value else {"name": value}
    here[name] = value


def _finishers(now: Iterable[Any], path: list[str], value: Any) -> list[Any]:
    """The finishers with `NAME.option` replaced wherever that one is; or, without a path, new ones: a list, or one."""
    from prunekit.plugins.finisher import Finisher
    from prunekit.plugins.registry import FINISHERS

    if not path:
        many = value if isinstance(value, (list, tuple)) else [value]
        return [FINISHERS.spec(each) if isinstance(each, Finisher) else each for each in many]
    specs = [FINISHERS.spec(FINISHERS.build(spec)) for spec in now]
    there = [spec for spec in specs if spec["name"] == path[0]]
    if not there:
        raise WrongInput(unknown("finisher of this recipe", path[0], [spec["name"] for spec in specs]))
    for spec in there:
        _put({path[0]: spec}, path, value)
    return specs


def _registries() -> dict[str, Any]:
    from prunekit.plugins.registry import ALLOCATORS, ENGINES, OBJECTIVES, PRUNERS

    return {"pruner": PRUNERS, "allocator": ALLOCATORS, "objective": OBJECTIVES, "engine": ENGINES}
