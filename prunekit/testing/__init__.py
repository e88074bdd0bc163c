"""Suites, toys and exact oracles for plug-in authors."""

from prunekit.search.exact import best_allocation
from prunekit.testing.adapters import AdapterSuite
from prunekit.testing.allocators import AllocatorSuite, converse
from prunekit.testing.engines import EngineSuite
from prunekit.testing.exporters import ExporterSuite
from prunekit.testing.finishers import FinisherSuite
from prunekit.testing.layers import LAYERS, permuted, toy_layer, with_statistics
from prunekit.testing.learners import LearnerSuite
from prunekit.testing.metrics import MetricSuite
from prunekit.testing.models import tiny
from prunekit.testing.objectives import ObjectiveSuite
from prunekit.testing.pruners import PrunerSuite
from prunekit.testing.signals import SignalSuite
from prunekit.testing.statistics import StatisticSuite
from prunekit.testing.supernets import KeepFirst, KeepLargest, toy_questions, toy_supernet, toy_tokens, toy_workpiece
from prunekit.testing.trackers import TrackerSuite
from prunekit.testing.widths import WidthSuite, toy_stream

__all__ = [
    "LAYERS",
    "AdapterSuite",
    "AllocatorSuite",
    "EngineSuite",
    "ExporterSuite",
    "FinisherSuite",
    "KeepFirst",
    "KeepLargest",
    "LearnerSuite",
    "MetricSuite",
    "ObjectiveSuite",
    "PrunerSuite",
    "SignalSuite",
    "StatisticSuite",
    "TrackerSuite",
    "WidthSuite",
    "best_allocation",
    "converse",
    "permuted",
    "tiny",
    "toy_layer",
    "toy_questions",
    "toy_stream",
    "toy_supernet",
    "toy_tokens",
    "toy_workpiece",
    "with_statistics",
]
