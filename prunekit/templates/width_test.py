"""The promises of every width, and the claim of this one."""

from dataclasses import replace

from prunekit.templates.width import Template
from prunekit.testing import WidthSuite, toy_stream


class TestTemplate(WidthSuite):
    plugin = Template()


def test_a_channel_that_one_norm_needs_stays() -> None:
    stream = toy_stream()
    absolute = stream.absolute.clone()
    absolute[0, 3] = 2 * absolute.max()
    assert Template().directions(replace(stream, absolute=absolute))[0] == 3
