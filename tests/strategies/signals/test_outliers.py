from dataclasses import replace

import torch

from prunekit.testing import toy_layer
from prunekit_strategies.signals.outliers import Outliers


def test_the_share_is_counted_over_all_maps_of_the_site_together():
    layer = toy_layer(6, 2, seed=3)
    scores = [layer.weight.double().abs() * layer.gram.diagonal().double().sqrt()]
    scores += [f.weight.double().abs() * f.require("power").double().sqrt() for f in layer.producers]
    pool = torch.cat([s.flatten() for s in scores])
    for multiple in (0.5, 1.0, 2.0, 5.0):
        assert Outliers(multiple).measure(layer) == float((pool > multiple * pool.mean()).double().mean())


def test_one_loud_weight_among_equal_ones_is_the_only_outlier():
    layer = replace(toy_layer(8, 1, 4), producers=())
    layer = replace(layer, weight=torch.ones(4, 8), gram=torch.eye(8))
    assert Outliers().measure(layer) == 0
    layer.weight[2, 3] = 50
    assert Outliers().measure(layer) == 1 / 32


def test_more_is_asked_fewer_are_found():
    found = [Outliers(m).measure(toy_layer(12, 2)) for m in (0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
