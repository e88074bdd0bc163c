"""Every registered exporter keeps what all exporters promise."""

from prunekit.plugins.registry import EXPORTERS
from prunekit.testing import ExporterSuite

globals().update(
    {f"Test_{name}": type(f"Test_{name}", (ExporterSuite,), {"plugin": EXPORTERS.build(name)}) for name in EXPORTERS}
)
