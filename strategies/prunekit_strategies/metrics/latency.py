"""Time on one machine, from a table that is measured there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import prunekit as pk
from prunekit.measure import latency
from prunekit.space.forms import Units
from prunekit.space.prices import Curve, Prices, Workload
from prunekit.system.progress import Progress
from prunekit_strategies.metrics.formulas import Flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Latency(pk.MeasuredMetric):
    """Nanoseconds of a workload: `batch` prompts read in one pass, then `new_tokens` made one by one from the cache.

    Prices are in a table by shape of sub-layer; a count that is not in it is raised to the next that is. The share
    that is asked for is of the whole model's time.
    """

    unit: ClassVar[str] = "latency"
    structures: ClassVar[frozenset[str]] = frozenset({"groups"})

    batch: int = 1  # prompts
    prompt: int | None = None  # tokens each; None: 256, or what fits
    new_tokens: int = 0
    prices: dict[str, Any] | str | None = field(default=None, hash=False)  # a table, its file or folder; None: measured

    def __post_init__(self) -> None:
        if self.batch < 1 or self.new_tokens < 0 or (self.prompt is not None and self.prompt < 1):
            raise ValueError("a workload has at least one prompt of at least one token")
        if self.prices is None:
            return
        table = Prices.load(self.prices) if isinstance(self.prices, str) else Prices.of(self.prices)
        for name, there in vars(table.workload).items():
            if (asked := getattr(self, name)) not in (None, there):
                raise pk.WrongInput(
                    f"the price table is of {name} {there}, and latency.{name} is {asked}; measure anew with "
                    "--set latency.prices=null"
                )
        object.__setattr__(self, "prompt", table.workload.prompt)
        object.__setattr__(self, "prices", table.as_dict())

    @cached_property
    def table(self) -> Prices | None:
        """What was measured."""
        return None if self.prices is None else Prices.of(self.prices)

    # -- prices -------------------------------------------------------------------------------------------

    def counts(self, site: pk.Site) -> Sequence[int]:
        return [k for k in self._curve(site).counts if k >= site.least]

    def price(self, site: pk.Site, kept: int) -> int:
        return self._curve(site).price(kept)

    def outside(self, sites: Sequence[pk.Site], parameters: int) -> int:
        many = Counter(site.shape for site in sites)
        for site in sites:
            self._curve(site)
        assert self.table is not None
        if many != {shape: curve.sites for shape, curve in self.table.curves.items()}:
            raise pk.WrongInput(
                "the price table is of a model with another number of sub-layers; measure anew with "
                "--set latency.prices=null"
            )
        return self.table.outside

    def check(self, units: Units) -> None:
        if units != "groups":
            zeros = "zeros are multiplied like other numbers and save no time"
            why = "of low rank no map was timed" if units == "low-rank" else zeros
            raise pk.WrongInput(f"{why}; latency goes with structure groups")

    def unreachable(self, share: Fraction, least: int, full: int) -> str:
        lowest = -(-10_000 * least // full) / 10_000
        return (
            f"latency={float(share):.4g} cannot be met: reachable is {lowest} to 1, because "
            f"{least / 1e6:.4g} of {full / 1e6:.4g} ms are spent where nothing can be removed"
        )

    def _curve(self, site: pk.Site) -> Curve:
        if self.table is None:
            raise pk.WrongInput(
                "latency has no prices but those of a table; measure one first: prunekit prune --target"
            )
        curve = self.table.curves.get(site.shape)
        if curve is None or curve.counts[-1] != site.n_groups:
            raise pk.WrongInput(
                f"the price table has no {site.shape}, as {site.name} is; it is of another model: measure anew with "
                "--set latency.prices=null"
            )
        return curve

    # -- measuring ----------------------------------------------------------------------------------------

    def measured(self, dense: pk.Dense, sites: Sequence[pk.Site], past: Path | None, progress: Progress) -> Self:
        """With the table it has; or the one an earlier process has left at `past`; or a new one."""
        table = self.table
        if table is None and past is not None and past.exists():
            table = Prices.load(past)
        if table is None:
            table = latency.prices(dense, sites, self._workload(dense.model), progress)
        elif (here := latency.hardware(dense.model)) != dict(table.hardware):
            there = {key: table.hardware.get(key) for key in here}
            differ = ", ".join(f"{key} {there[key]}, here {here[key]}" for key in here if here[key] != there[key])
            progress.say(f"warning: the price table was measured elsewhere ({differ}); times here may be others")
        return type(self)(**vars(table.workload), prices=table.as_dict())

    def stand_in(self) -> pk.Metric:
        return Flops()

    def runs_before(self, model: PreTrainedModel, sites: Sequence[pk.Site]) -> pk.Runs:
        return latency.runs_before(self._workload(model), sites)

    def runs_after(self, model: PreTrainedModel) -> pk.Runs:
        return latency.runs(self._workload(model), 2)

    def realised(
        self, dense: PreTrainedModel, small: PreTrainedModel, target: float, promised: float, progress: Progress
    ) -> Mapping[str, Any]:
        assert self.table is not None
        return latency.realised(dense, small, self.table, target, promised, progress)

    def _workload(self, model: PreTrainedModel) -> Workload:
        return latency.workload(self.batch, self.prompt, self.new_tokens, model)
