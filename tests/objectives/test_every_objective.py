"""Every registered objective keeps the promises of objectives."""

import pytest

from prunekit.plugins.registry import OBJECTIVES
from prunekit.testing import ObjectiveSuite

VARIANTS = {
    "divergence": [{"rest": False}, {"top_k": 4}],
    "expected-error": [{"table": "fisher"}],
    "hidden-state": [{"beside": None}, {"at": [0.3], "beside": {"name": "robust", "rule": "max"}}],
    "robust": [
        {"rule": "ball"},
        {"inner": "perplexity", "rule": "max", "reference": False},
        {"inner": {"name": "hidden-state", "beside": None}},
    ],
    "task": [{"measure": "margin", "normalised": False}, {"measure": "likelihood"}],
}


@pytest.mark.parametrize(
    "spec", [{"name": name, **options} for name in OBJECTIVES for options in [{}, *VARIANTS.get(name, [])]], ids=str
)
class TestEveryObjective(ObjectiveSuite):
    @pytest.fixture(autouse=True)
    def _plugin(self, spec):
        type(self).plugin = OBJECTIVES.build(spec)
