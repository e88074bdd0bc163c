"""Whose time is meant by metric latency."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from prunekit.errors import WrongInput
from prunekit.space.prices import Prices
from prunekit.system.strict import Strict


class LatencySpec(Strict):
    """Whose time is meant by metric latency, and the table of what was measured. None: chosen, measured by a run."""

    batch: Annotated[int, Field(ge=1)] = 1  # prompts
    prompt: Annotated[int, Field(ge=1)] | None = None  # tokens each, read in one pass; None: 256, or what fits
    new_tokens: Annotated[int, Field(ge=0)] = 0  # made one by one from the cache
    prices: dict[str, Any] | str | None = None  # a table, or its file, or the folder of a result

    @property
    def table(self) -> Prices | None:
        """The table that is given.

        Raises:
            WrongInput: it cannot be read, or is of another workload.
        """
        if self.prices is None:
            return None
        found = Prices.load(self.prices) if isinstance(self.prices, str) else Prices.of(self.prices)
        for name in ("batch", "prompt", "new_tokens"):
            asked, there = getattr(self, name), getattr(found.workload, name)
            if asked not in (None, there):
                raise WrongInput(
                    f"the price table is of {name} {there}, and latency.{name} is {asked}; measure anew with "
                    "--set latency.prices=null"
                )
        return found

    def measured(self, table: Prices) -> LatencySpec:
        """With the table and its workload written in."""
        return LatencySpec(**vars(table.workload), prices=table.as_dict())
