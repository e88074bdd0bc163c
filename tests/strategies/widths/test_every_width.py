"""Every registered width keeps the promises of the suite."""

import pytest

from prunekit.plugins.registry import WIDTHS
from prunekit.testing import WidthSuite


class TestEveryWidth(WidthSuite):
    @pytest.fixture(autouse=True, params=list(WIDTHS))
    def _plugin(self, request: pytest.FixtureRequest) -> None:
        self.plugin = WIDTHS.build(request.param)
