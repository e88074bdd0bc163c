"""Minitron's order of the channels."""

from dataclasses import replace

import torch

from prunekit.testing import toy_stream
from prunekit_strategies.widths.minitron import Minitron


def test_channels_are_ordered_by_what_norms_before_sub_layers_make_of_them():
    stream = toy_stream()
    scores = [sum(float(row[channel]) for row in stream.absolute[:-1]) for channel in range(12)]
    order = Minitron().directions(stream).tolist()
    assert order == sorted(range(12), key=lambda channel: -scores[channel])
    assert order != list(range(12))


def test_of_channels_that_are_alike_the_first_stays():
    stream = replace(toy_stream(), absolute=torch.ones(3, 12, dtype=torch.float64))
    assert Minitron().directions(stream).tolist() == list(range(12))
