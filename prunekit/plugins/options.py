"""Options that are one of a few values, checked where Python builds a plug-in; a recipe is checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choices(plugin: Any) -> None:
    """For `__post_init__`: refuse values that fields of type `Literal`, or such a type or None, do not list.

    Raises:
        ValueError: names the field, what it was given, and what there is.
    """
    for name, known in _choices(type(plugin)).items():
        if (value := getattr(plugin, name)) not in known:
            raise ValueError(f"no {name} {value!r}; there are {', '.join(map(str, known))}")


@cache
def _choices(plugin: type) -> Mapping[str, tuple[Any, ...]]:
    """Field -> all it may be, for fields of which that is listed."""
    hints, found = get_type_hints(plugin), dict[str, tuple[Any, ...]]()
    for field in fields(plugin):
        hint = hints[field.name]
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if {get_origin(part) for part in parts if part is not NoneType} == {Literal}:
            found[field.name] = tuple(value for part in parts for value in get_args(part) or (None,))
    return found
