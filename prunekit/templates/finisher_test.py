"""The promises of every finisher, and the claim of this one."""

import pytest

from prunekit.calibration.twin import Twin
from prunekit.templates.finisher import Template
from prunekit.testing import FinisherSuite, toy_workpiece


class TestTemplate(FinisherSuite):
    plugin = Template()


def test_outputs_have_the_power_of_the_dense_ones() -> None:
    piece = toy_workpiece()
    Template().finish(piece)
    for here in Twin(piece, piece.tokens):
        made, wanted = (float(y.square().sum()) for y in (here.made(0), here.wanted(0, "dense")))
        assert made == pytest.approx(wanted)
