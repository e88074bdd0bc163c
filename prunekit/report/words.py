"""Numbers of a report in words; one place, so that a table, a page and a notebook say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prunekit.report.statistics import Difference


def number(value: Any, digits: int = 2) -> str:
    """A measured value; inf where it is not finite, which a file says as null."""
    return f"{value:,.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "inf"


def finite(value: Any) -> float | None:
    """A value that a chart can place."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def said(found: Difference) -> str:
    """A difference with its interval."""
    if not math.isfinite(found.low):
        return "no finite loss"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def differs(overrides: Mapping[str, Any]) -> str:
    """What a recipe sets, in one line."""
    return ", ".join(f"{key} {chosen(value)}" for key, value in overrides.items())


def chosen(value: Any) -> str:
    """A choice, a plug-in with its options."""
    if isinstance(value, Mapping) and "name" in value:
        options = differs({name: option for name, option in value.items() if name != "name"})
        return str(value["name"]) + (f" ({options})" if options else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
