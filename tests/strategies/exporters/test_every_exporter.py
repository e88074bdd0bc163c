"""Every registered exporter keeps what all exporters promise."""

import pytest

from prunekit.plugins.registry import EXPORTERS
from prunekit.testing import ExporterSuite

TRACED = {"onnx"}  # a model is traced for seconds, several times in a suite


def suite(name: str) -> type:
    made = type(f"Test_{name}", (ExporterSuite,), {"plugin": EXPORTERS.build(name)})
    return pytest.mark.slow(made) if name in TRACED else made


globals().update({f"Test_{name}": suite(name) for name in EXPORTERS})
