"""Every registered signal, and the variants worth a run of their own, keep the promises of the suite."""

from collections.abc import Mapping
from typing import Any

import pytest

from prunekit.plugins.registry import SIGNALS
from prunekit.testing import SignalSuite

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "outliers, many": {"name": "outliers", "multiple": 1.0},
    "stiffness, diagonal": {"name": "stiffness", "diagonal": True},
    "tail-exponent, one bin": {"name": "tail-exponent", "bins": 1},
}


class TestEverySignal(SignalSuite):
    @pytest.fixture(autouse=True, params=[*SIGNALS, *VARIANTS])
    def _plugin(self, request: pytest.FixtureRequest) -> None:
        self.plugin = SIGNALS.build(VARIANTS.get(request.param, request.param))
