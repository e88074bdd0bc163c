"""How a recipe names a plug-in."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _as_spec(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def as_engine(value: Any) -> Any:
    """ray://head:10001 is short for {name: ray, address: ray://head:10001}."""
    name, there, _ = value.partition("://") if isinstance(value, str) else ("", "", "")
    return {"name": name, "address": value} if there else value


Spec = Annotated[dict[str, Any], BeforeValidator(_as_spec)]
"""A plug-in: {name: ..., option: value}; a bare name is short for {name: ...}."""
