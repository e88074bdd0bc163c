"""Types and values of options in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

NAMES = {bool: "yes/no", int: "whole number", float: "number", str: "text", dict: "a mapping", Any: "anything"}


def type_in_words(hint: Any, kind_of: Callable[[Any], str | None]) -> str:
    """What an option takes: "number", "one of: a, b", "a list of numbers", "a pruner, or none", ...

    Args:
        hint: the type of the option.
        kind_of: the kind of plug-in that a type is the contract of; None: of none.
    """
    parts, origin, inner = get_args(hint), get_origin(hint) or hint, partial(type_in_words, kind_of=kind_of)
    if origin in (Union, UnionType):
        *said, last = map(inner, sorted(parts, key=lambda part: part is NoneType))
        return f"{' or '.join(said)}, or none" if NoneType in parts else f"{', '.join(said)} or {last}"
    if origin is Literal:
        return f"one of: {', '.join(map(value_in_words, parts))}"
    if parts and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if parts and origin is tuple and parts[-1] is not ...:
        return f"{len(parts)} values: {', '.join(map(inner, parts))}"
    if parts:  # tuple[X, ...], Sequence[X], ...
        return f"a list, each {inner(parts[0])}"
    return _with_article(kind) if (kind := kind_of(hint)) else NAMES.get(origin, getattr(origin, "__name__", str(hint)))


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


def choices_of(hint: Any) -> tuple[Any, ...]:
    """All that a type lists, where it is one of a few values, or one of them or none; otherwise nothing."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if {get_origin(part) for part in parts if part is not NoneType} != {Literal}:
        return ()
    return tuple(value for part in parts for value in get_args(part) or (None,))


def no_choice(name: str, value: object, known: Sequence[Any]) -> str:
    """One sentence for a value that is not among a few."""
    return f"no {name} {value!r}; there are {', '.join(map(value_in_words, known))}"
