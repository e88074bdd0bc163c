"""Types and values of options in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from prunekit.plugins.registry import KINDS

NAMES = {bool: "yes/no", int: "whole number", float: "number", str: "text", dict: "a mapping", Any: "anything"}


def type_in_words(hint: Any) -> str:
    """What an option takes: "number", "one of: a, b", "a list of numbers", "a pruner, or none", ..."""
    parts, origin = get_args(hint), get_origin(hint) or hint
    if origin in (Union, UnionType):
        *said, last = map(type_in_words, sorted(parts, key=lambda part: part is NoneType))
        return f"{' or '.join(said)}, or none" if NoneType in parts else f"{', '.join(said)} or {last}"
    if origin is Literal:
        return f"one of: {', '.join(map(value_in_words, parts))}"
    if parts and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if parts and origin is tuple and parts[-1] is not ...:
        return f"{len(parts)} values: {', '.join(map(type_in_words, parts))}"
    if parts:  # tuple[X, ...], Sequence[X], ...
        return f"a list, each {type_in_words(parts[0])}"
    kind = next((registry.kind for registry in KINDS if registry.contract is hint), None)
    return _with_article(kind) if kind else NAMES.get(origin, getattr(origin, "__name__", str(hint)))


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def value_in_words(value: Any) -> str:
    """A default: yes, none, obs, 1, 2, ..."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping) and "name" in value:  # a plug-in, whose options have a page of their own
        return str(value["name"])
    if isinstance(value, (list, tuple)):
        return ", ".join(map(value_in_words, value)) or "none"
    return "none" if value is None else str(value)
