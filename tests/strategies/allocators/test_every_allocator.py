"""Every registered allocator, and the variants worth a run of their own, keep the promises of the suite."""

from collections.abc import Mapping
from typing import Any

import pytest

from prunekit.plugins.allocator import Allocator
from prunekit.plugins.registry import ALLOCATORS
from prunekit.testing import AllocatorSuite

QUICK: Mapping[str, Mapping[str, Any]] = {
    "optuna-tpe": {"trials": 14},
    "nevergrad": {"trials": 20},
    "random": {"draws": 20},
    "nsga": {"population": 8, "generations": 4},
    "policy-gradient": {"steps": 4},
    "milp": {"candidates": 3},
}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "drop, blocks once": {"name": "drop", "unit": "blocks", "order": "once", "per_price": True},
    "drop, scores": {"name": "drop", "order": "once", "by": "scores"},
    "drop, per price": {"name": "drop", "per_price": True},
    "2ssp, none": {"name": "2ssp", "removed": 0, "tokens": 512},
    "minitron, depth alone": {"name": "minitron", "depth": 1.0, "equal": False, "tokens": 512},
    "mop, best block": {"name": "mop", "block": "best", "steps": 3},
    "evolution, cold": {"name": "evolution", "warm_start": "none"},
    "evolution, one stage": {"name": "evolution", "selections": [[1, 4_096]], "offspring": 3},
    "greedy, table": {"name": "greedy", "by": "table", "table": "errors"},
    "greedy, all": {"name": "greedy", "width": None, "steps": 3},
    "milp, dense": {"name": "milp", "candidates": 2, "around": "dense", "points": 2, "reach": 1.0, "stride": 0.5},
    "nsga, price": {"name": "nsga", "population": 8, "generations": 4, "against": "price"},
    "schedule, atp": {"name": "schedule", "shape": "linear-increase", "highest": 1.0, "grid": 5},
    "schedule, attention falls": {"name": "schedule", "shape": "log-decrease", "bends": "attention"},
    "table, errors": {"name": "table", "table": "errors"},
    "table, fisher": {"name": "table", "table": "fisher"},
    "evolution, fisher": {"name": "evolution", "warm_start": "fisher"},
    "softmax, errors": {"name": "softmax", "table": "errors"},
    "tyr of fisher": {"name": "tyr", "inner": {"name": "greedy", "by": "table", "table": "fisher"}},
    "table, drop or keep": {"name": "table", "around": "dense", "reach": 1.0, "stride": 1.0},
    "softmax, dilute": {"name": "softmax", "rule": "softmax", "temperature": 0.5},
    "softmax, threshold": {"name": "softmax", "rule": "threshold"},
    "softmax, compliance": {"name": "softmax", "rule": "compliance"},
    "self-pruner, few": {"name": "self-pruner", "population": 2, "offspring": 1, "warm_start": False},
    "softmax, water-filling": {"name": "softmax", "rule": "water-filling"},
    "softmax of scores": {"name": "softmax", "energy": "scores", "most": 0.8},
    "softmax, threshold of scores": {"name": "softmax", "rule": "threshold", "energy": "scores", "most": 0.9},
    "metric-map, rank of kinds": {"name": "metric-map", "scale": "rank", "per": "kind", "keep": "low"},
    "metric-map, sigmoid of sites": {"name": "metric-map", "scale": "sigmoid", "per": "site", "combine": "scale"},
    "metric-map, any spread": {"name": "metric-map", "signal": "influence", "spread": None},
    "global-rank, l2 per price": {"name": "global-rank", "normalise": "l2", "per_price": True},
    "tyr of metric-map": {"name": "tyr", "inner": "metric-map"},
    "tyr of global-rank": {"name": "tyr", "inner": "global-rank"},
    "tyr of uniform": {"name": "tyr", "inner": "uniform"},
    "tyr of threshold": {"name": "tyr", "inner": {"name": "softmax", "rule": "threshold"}},
    "optuna-tpe, waves": {"name": "optuna-tpe", "trials": 14, "waves": 1},
    "nevergrad, waves": {"name": "nevergrad", "trials": 20, "waves": 1, "optimizer": "TwoPointsDE"},
}


class TestEveryAllocator(AllocatorSuite):
    @pytest.fixture(
        autouse=True, params=[*ALLOCATORS, *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)]
    )
    def _plugin(self, request: pytest.FixtureRequest) -> None:
        name = request.param
        spec = VARIANTS.get(name, {"name": name, **QUICK.get(name, {})})
        try:
            self.plugin: Allocator = ALLOCATORS.build(spec)
        except ImportError as missing:
            pytest.skip(str(missing))
