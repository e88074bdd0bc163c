"""A section of a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from prunekit.report.page.charts import Chart


@dataclass(frozen=True)
class Part:
    """A section of a page."""

    title: str  # of the page that begins with it
    heading: str
    anchor: str  # that no other section of the page has
    before: str = ""  # HTML in front of the charts
    charts: Sequence[Chart] = field(default=())
    after: str = ""  # HTML behind them
