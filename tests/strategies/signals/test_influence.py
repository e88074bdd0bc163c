from dataclasses import replace

from prunekit.testing import toy_layer
from prunekit_strategies.signals.influence import Influence


def test_it_is_what_calibration_measured():
    assert Influence().measure(replace(toy_layer(), influence=0.25)) == 0.25
