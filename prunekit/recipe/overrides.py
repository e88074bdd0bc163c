"""Overrides: KEY=VALUE replaces one value of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from prunekit.errors import WrongInput, unknown
from prunekit.recipe.parts import as_engine

if TYPE_CHECKING:
    from prunekit.plugins.registry import Registry


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
    if slot in ("finishers", "exporters"):
        values[slot] = _listed(slot, values[slot], path, value)
        return
    if slot == "metric" and path and isinstance(values.get(str(values["metric"])), dict):
        slot = values["metric"]  # whose options are a section
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


def _listed(slot: str, now: Iterable[Any], path: list[str], value: Any) -> list[Any]:
    """Plug-ins with `NAME.option` replaced wherever that one is; or, without a path, new ones: a list, or one."""
    from prunekit.plugins.registry import EXPORTERS, FINISHERS

    registry: Registry[Any] = {"finishers": FINISHERS, "exporters": EXPORTERS}[slot]
    if not path:
        many = value if isinstance(value, (list, tuple)) else [value]
        return [registry.spec(each) if isinstance(each, registry.contract) else each for each in many]
    specs = [registry.spec(registry.build(spec)) for spec in now]
    there = [spec for spec in specs if spec["name"] == path[0]]
    if not there:
        raise WrongInput(unknown(f"{registry.kind} of this recipe", path[0], [spec["name"] for spec in specs]))
    for spec in there:
        _put({path[0]: spec}, path, value)
    return specs


def _registries() -> dict[str, Any]:
    from prunekit.plugins.registry import ALLOCATORS, ENGINES, METRICS, OBJECTIVES, PRUNERS

    parts = {"pruner": PRUNERS, "allocator": ALLOCATORS, "objective": OBJECTIVES}
    return parts | {"metric": METRICS, "engine": ENGINES}
