"""The promises of every exporter."""

from prunekit.templates.exporter import Template
from prunekit.testing import ExporterSuite


class TestTemplate(ExporterSuite):
    plugin = Template()


class TestTemplateInHalf(ExporterSuite):
    plugin = Template(half=True)
