"""Every registered exporter keeps what all exporters promise."""

import pytest

from prunekit.plugins.registry import EXPORTERS
from prunekit.testing import ExporterSuite

SLOW = {
    "onnx": "a model is traced for seconds, several times in a suite",
    "vllm": "it writes and verifies what hf does, which is in the suite",
}


def suite(name: str) -> type:
    made = type(f"Test_{name}", (ExporterSuite,), {"plugin": EXPORTERS.build(name)})
    return pytest.mark.slow(made) if name in SLOW else made


globals().update({f"Test_{name}": suite(name) for name in EXPORTERS})
