import torch

from prunekit.testing import toy_layer, with_statistics
from prunekit_strategies.signals.influence import Influence


def test_it_is_what_calibration_measured():
    assert Influence().measure(with_statistics(toy_layer(), influence=torch.tensor(0.25))) == 0.25


def test_since_the_block_it_is_the_turn():
    signal, layer = Influence(since="block"), with_statistics(toy_layer(), turn=torch.tensor(0.5))
    assert (signal.needs, signal.measure(layer)) == ({"turn"}, 0.5)
