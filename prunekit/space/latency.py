"""Whose time is meant by metric latency, as a section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from prunekit.system.strict import Strict


class LatencySpec(Strict):
    """The options of metric latency, which a recipe has in a section of its own."""

    batch: Annotated[int, Field(ge=1)] = 1  # prompts
    prompt: Annotated[int, Field(ge=1)] | None = None  # tokens each, read in one pass; None: 256, or what fits
    new_tokens: Annotated[int, Field(ge=0)] = 0  # made one by one from the cache
    prices: dict[str, Any] | str | None = None  # a table, or its file, or the folder of a result
