"""How a recipe writes plug-ins and structures, read into one form each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from prunekit.errors import WrongInput
from prunekit.space.forms import parse_form
from prunekit.system.strict import Strict

OUTWARD = frozenset(
    {"base_url", "key_variable", "address", "push_to_hub"}
)  # by which a plug-in says whom it talks to, with which key


def _blocks(value: int | float) -> int | float:
    if value >= 1 and value != int(value):
        raise WrongInput(f"blocks are a whole number, or a share of all below 1, not {value}")
    return int(value) if value >= 1 else value


Blocks = Annotated[int | float, Field(ge=0), AfterValidator(_blocks)]
"""A number of decoder blocks, or, below 1, a share of all, rounded to whole ones, halves up."""


class SpareSpec(Strict):
    """How many decoder blocks at either end stay as they are, and which kinds of sub-layers do in every block."""

    first: Blocks = 0
    last: Blocks = 0
    kinds: tuple[Literal["attention", "mixer", "mlp", "experts"], ...] = ()  # those that a model lacks are passed over

    def of(self, depth: int) -> tuple[int, int]:
        """Both in blocks, of a model of so many."""
        first, last = (
            int(n) if n >= 1 else math.floor(Fraction(str(n)) * depth + Fraction(1, 2)) for n in (self.first, self.last)
        )
        return first, last


def as_spec(value: Any) -> Any:
    """wanda is short for {name: wanda}."""
    return {"name": value} if isinstance(value, str) else value


def as_specs(value: Any) -> Any:
    """One plug-in may stand where a list of them is asked for."""
    return [value] if isinstance(value, (str, Mapping)) else value


def as_engine(value: Any) -> Any:
    """ray://head:10001 is short for {name: ray, address: ray://head:10001}."""
    name, there, _ = value.partition("://") if isinstance(value, str) else ("", "", "")
    return {"name": name, "address": value} if there else value


def as_pattern(value: Any) -> Any:
    """YAML 1.1 reads 2:4 as 2 · 60 + 4."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) and value > 60 else value


def own_share(structure: Any) -> Fraction | None:
    """The share that a structure keeps by itself; None: any, or it is none (said where the recipe is resolved)."""
    try:
        return parse_form(structure).kept_share if isinstance(structure, str) else None
    except WrongInput:
        return None


Spec = Annotated[dict[str, Any], BeforeValidator(as_spec)]
"""A plug-in: {name: ..., option: value}; a bare name is short for {name: ...}."""


def outward(value: Any, path: str, plugin: Any = None) -> dict[str, tuple[Any, Any]]:
    """Find the options of `OUTWARD` in what a recipe, or a caller, says of a key.

    Returns:
        Dotted key -> (name of the plug-in, value); plug-ins in a list go by name, as in `override`.
    """
    found = dict[str, tuple[Any, Any]]()
    if isinstance(value, Mapping):
        for key, inner in value.items():
            found |= outward(inner, f"{path}.{key}", value.get("name"))
    elif isinstance(value, list | tuple):
        for inner in value:
            found |= outward(
                inner, f"{path}.{inner['name']}" if isinstance(inner, Mapping) and "name" in inner else path
            )
    elif path.rpartition(".")[2] in OUTWARD:
        found[path] = plugin, value
    return found
