"""The promises of every engine, on one device and on two."""

from prunekit.templates.engine import Template
from prunekit.testing import EngineSuite


class TestTemplate(EngineSuite):
    plugin = Template(each=3)
    devices = ("cpu",)


class TestTemplateOnTwoDevices(EngineSuite):
    plugin = Template(each=1)
