"""Suites, toys and exact oracles for plug-in authors."""

from prunekit.testing.allocators import AllocatorSuite, converse
from prunekit.testing.layers import LAYERS, permuted, toy_layer
from prunekit.testing.oracle import best_allocation
from prunekit.testing.pruners import PrunerSuite

__all__ = [
    "LAYERS",
    "AllocatorSuite",
    "PrunerSuite",
    "best_allocation",
    "converse",
    "permuted",
    "toy_layer",
]
