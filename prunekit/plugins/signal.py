"""Layer sensitivity metrics: one number per site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from prunekit.layer.problem import LayerProblem
from prunekit.layer.statistics import Need


class Signal(ABC):
    """Measures one number per site, for allocators that decide from numbers like it."""

    unitless: ClassVar[bool] = False  # True: the same number when all weights of the site are in other units

    @property
    def needs(self) -> frozenset[Need]:
        """What calibration must tell of a layer, as for a pruner."""
        return frozenset({"gram"})

    @abstractmethod
    def measure(self, layer: LayerProblem) -> float:
        """A finite number that does not depend on the order of the groups. The layer is not changed."""


Measurable = Signal | str | Mapping[str, Any]
"""A signal, its name, or {name: ..., option: value} as in a recipe."""
