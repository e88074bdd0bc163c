"""Every registered metric, with options a user may set, keeps what all metrics promise."""

from collections.abc import Iterator
from typing import Any

from prunekit.plugins.registry import METRICS
from prunekit.testing import MetricSuite

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "bytes": [{}, {"per_parameter": 1}],
    "latency": [{"prompt": 8}, {"batch": 2, "prompt": 4, "new_tokens": 2}],
}


def suites() -> Iterator[type[MetricSuite]]:
    for name in METRICS:
        for options in VARIANTS.get(name, [{}]):
            label = "_".join([name, *(f"{k}_{v}" for k, v in options.items())])
            yield type(f"Test_{label}", (MetricSuite,), {"plugin": METRICS.build({"name": name} | options)})


globals().update({suite.__name__: suite for suite in suites()})
