"""Every registered metric, with options a user may set, keeps what all metrics promise."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel

from prunekit.measure import latency
from prunekit.plugins.registry import METRICS
from prunekit.space.prices import Workload
from prunekit.testing import MetricSuite

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "bytes": [{}, {"per_parameter": 1}],
    "latency": [{"prompt": 8}, {"batch": 2, "prompt": 4, "new_tokens": 2}],
}


@pytest.fixture(autouse=True, scope="module")
def _clock() -> Any:
    """Time is made up: of parameters and tokens, the same in every run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"FEWEST": 1, "SECONDS": 0.0, "TURN": 1, "nanoseconds": made_up}.items():
            patch.setattr(latency, name, value)
        yield


def made_up(model: PreTrainedModel, work: Workload) -> int:
    return sum(p.numel() for p in model.parameters()) * work.batch * (work.prompt + work.new_tokens)


def suites() -> Iterator[type[MetricSuite]]:
    for name in METRICS:
        for options in VARIANTS.get(name, [{}]):
            label = "_".join([name, *(f"{k}_{v}" for k, v in options.items())])
            yield type(f"Test_{label}", (MetricSuite,), {"plugin": METRICS.build({"name": name} | options)})


globals().update({suite.__name__: suite for suite in suites()})
