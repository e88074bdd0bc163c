"""Options that are one of a few values, checked where Python builds a plug-in; a recipe is checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from prunekit.plugins.words import choices_of, no_choice


def check_choices(plugin: Any) -> None:
    """For `__post_init__`: refuse values that fields of type `Literal`, or such a type or None, do not list.

    Raises:
        ValueError: names the field, what it was given, and what there is.
    """
    for name, known in _choices(type(plugin)).items():
        if (value := getattr(plugin, name)) not in known:
            raise ValueError(no_choice(name, value, known))


@cache
def _choices(plugin: type) -> Mapping[str, tuple[Any, ...]]:
    """Field -> all it may be, for fields of which that is listed."""
    hints = get_type_hints(plugin)
    return {field.name: known for field in fields(plugin) if (known := choices_of(hints[field.name]))}
