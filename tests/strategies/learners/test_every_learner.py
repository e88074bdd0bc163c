"""Every registered learner keeps the promises of the suite."""

from collections.abc import Mapping
from typing import Any

import pytest

from prunekit.plugins.learner import Learner
from prunekit.plugins.registry import LEARNERS
from prunekit.testing import LearnerSuite

QUICK: Mapping[str, Mapping[str, Any]] = {
    "grasprune": {"steps": 64, "rate": 0.05, "batch_tokens": 8, "scale_steps": 4},
    # spread 0: the power of groups, which here is their worth, tells it nothing
    "bypass-bp": {"steps": 120, "draws": 4, "rate": 0.2, "batch_tokens": 32, "spread": 0.0},
    # gates that are slow beside the multipliers: by sign alone, one that is worth its price has time to come back
    "ddp": {"steps": 300, "batch_tokens": 8, "rate": 0.01, "penalty_rate": 1.0},
    "gisp": {"steps": 6, "tokens": 512},
    "sheared-llama": {
        "steps": 48, "batch_tokens": 8, "mask_rate": 0.5, "multiplier_rate": 0.2, "loading": "dynamic", "rate": 1e-3,
    },
    "dr-pruning": {
        "steps": 48, "batch_tokens": 8, "mask_rate": 0.5, "multiplier_rate": 0.2, "fit": False, "rate": 1e-3,
    },
    "lora-prune": {"steps": 12, "batch_tokens": 32, "every": 2, "rank": 2, "rate": 1e-2, "compare": "all"},
    "bip": {"steps": 32, "batch_tokens": 8, "mask_rate": 0.05, "rate": 1e-3},
    "sls": {"steps": 24, "batch_tokens": 8, "score_rate": 0.1, "penalty": 0.5, "rate": 1e-3, "patience": 1},
}  # fmt: skip

LEFT: Mapping[str, tuple[float, float, float]] = {  # on losses that are linear, flat around what is kept, of pairs
    "bypass-bp": (0.25, 0.15, 0.2),  # of few draws
    "ddp": (0.35, 0.2, 0.45),  # Adam hears of slopes of one size their sign alone
    "sheared-llama": (0.6, 0.4, 0.6),  # of few draws
    "dr-pruning": (0.6, 0.4, 0.6),
    "sls": (0.1, 0.3, 0.2),  # a rank that is kept without a slope is not told from others
}


class TestEveryLearner(LearnerSuite):
    strict = True

    @pytest.fixture(autouse=True, params=list(LEARNERS))
    def _plugin(self, request: pytest.FixtureRequest) -> None:
        name = request.param
        self.plugin: Learner = LEARNERS.build({"name": name, **QUICK.get(name, {})})
        own = LearnerSuite
        self.slack, self.flat_slack, self.pairs_slack = LEFT.get(name, (own.slack, own.flat_slack, own.pairs_slack))
