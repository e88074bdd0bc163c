"""The promises of every adapter, on a tiny random model of the family."""

from prunekit.templates.adapter import Template
from prunekit.testing import AdapterSuite


class TestTemplate(AdapterSuite):
    plugin = Template()
