"""YAML that anyone may have written, as plain values: text, numbers, lists and mappings, no more than a recipe has."""

from __future__ import annotations

import math
from typing import Any

import yaml

from prunekit.errors import WrongInput, first_line

MOST_LETTERS = 1 << 17  # of a text
MOST_VALUES = 1 << 16  # in it, those that an alias repeats counted again
MOST_BITS = 128  # of a whole number
DEEPEST = 64


def read_plain(text: str, what: str) -> Any:
    """Read YAML.

    Args:
        text: of one document.
        what: the text is called in sentences.

    Raises:
        WrongInput: it is no YAML, larger than any recipe, or holds what is no plain value.
    """
    if len(text) > MOST_LETTERS:
        raise WrongInput(f"{what} has {len(text):,} letters, and no more than {MOST_LETTERS:,} are read")
    loader = yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(text)
        if (node := loader.get_single_node()) is None:
            return None
        if _count(node, {}, DEEPEST) > MOST_VALUES:
            raise WrongInput(f"{what} stands for more than {MOST_VALUES:,} values; its aliases repeat too much")
        values = loader.construct_document(node)
    except WrongInput:
        raise
    except RecursionError:
        raise WrongInput(f"{what} is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise WrongInput(f"{what}{where} is not YAML: {getattr(error, 'problem', None) or first_line(error)}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # of values that look like a number or a date
        raise WrongInput(f"{what} holds a value that cannot be read: {first_line(error)}") from None
    finally:
        loader.dispose()
    _check(values, "", what)
    return values


def _count(node: yaml.Node, counted: dict[int, int], deeper: int) -> int:
    """The values that a node stands for. An alias in itself is as deep as anything can be."""
    if deeper < 0:
        raise RecursionError
    if id(node) not in counted:
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = inside if isinstance(node, yaml.CollectionNode) else ()
        counted[id(node)] = 1 + sum(_count(part, counted, deeper - 1) for part in parts)
    return counted[id(node)]


def _check(value: Any, key: str, what: str) -> None:
    """Refuse dates, bytes, sets, and numbers that are none."""
    of = f"{what}: {key}" if key else what
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str | int | float):
                raise WrongInput(f"{of} has the key {name!r}; keys are words")
            _check(inner, f"{key}.{name}" if key else str(name), what)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check(inner, f"{key}[{i}]", what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise WrongInput(f"{of} is {value}, which is no finite number")
    elif isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise WrongInput(f"{of} is a number of {value.bit_length():,} bits; no more than {MOST_BITS} are read")
    elif not isinstance(value, str | int | float | None):
        raise WrongInput(f"{of} is a {type(value).__name__}, {str(value)[:60]!r}; quote it where text is meant")
