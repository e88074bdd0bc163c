"""Every registered allocator, and the variants worth a run of their own, keep the promises of the suite."""

from collections.abc import Mapping
from typing import Any

import pytest

from prunekit.contracts import Allocator
from prunekit.registry import ALLOCATORS
from prunekit.testing import AllocatorSuite

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "evolution, cold": {"name": "evolution", "warm_start": False},
    "evolution, one stage": {"name": "evolution", "selections": [[1, 4_096]], "offspring": 3},
    "tyr of uniform": {"name": "tyr", "inner": "uniform"},
}


class TestEveryAllocator(AllocatorSuite):
    @pytest.fixture(autouse=True, params=[*ALLOCATORS, *VARIANTS])
    def _plugin(self, request: pytest.FixtureRequest) -> None:
        self.plugin: Allocator = ALLOCATORS.build(VARIANTS.get(request.param, request.param))
