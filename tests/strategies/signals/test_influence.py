import torch

from prunekit.testing import toy_layer, with_statistics
from prunekit_strategies.signals.influence import Influence


def test_it_is_what_calibration_measured():
    assert Influence().measure(with_statistics(toy_layer(), influence=torch.tensor(0.25))) == 0.25
