"""Prune language models: any pruner, any allocator, any objective; a smaller model that loads anywhere.

Names are imported when they are used: the package itself loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prunekit.models import registration

if TYPE_CHECKING:
    from prunekit.api import compare, evaluate, prune, tune
    from prunekit.calibration.moments import Moments
    from prunekit.data.tokens import TokenBatch
    from prunekit.engine.worker import Worker
    from prunekit.errors import NotVerified, PluginError, WrongInput
    from prunekit.layer.candidates import Candidate, best_groups, best_weights, ranked
    from prunekit.layer.problem import LayerProblem
    from prunekit.layer.solving import factored, inverted, solved
    from prunekit.layer.statistics import MapShape, Need, Received, Statistic, Total
    from prunekit.layer.sublayer import CutSubLayer, SubLayer
    from prunekit.plugins.adapter import ModelAdapter
    from prunekit.plugins.allocator import Allocator, Journal, Problem, Query, Search, Searched
    from prunekit.plugins.dense import Dense
    from prunekit.plugins.engine import Engine, Opening, Team
    from prunekit.plugins.exporter import Exporter, Inquiry, Order, Probe, Product, Response
    from prunekit.plugins.finisher import Finisher, Workpiece
    from prunekit.plugins.learner import Decision, Effort, GateProblem, GateQuery, GateReply, Learner, Lesson, Training
    from prunekit.plugins.metric import MeasuredMetric, Runs
    from prunekit.plugins.objective import Answers, Objective, Reads
    from prunekit.plugins.options import check_choices
    from prunekit.plugins.pruner import LocalPruner
    from prunekit.plugins.signal import Signal
    from prunekit.plugins.tracker import Point, Setting, Track, Tracker
    from prunekit.plugins.width import ResidualStream, Width
    from prunekit.recipe.resolve import Parts, resolve
    from prunekit.recipe.schema import Recipe
    from prunekit.run.family import Family
    from prunekit.run.results import Result
    from prunekit.search.store import CandidateStore
    from prunekit.search.supernet import Supernet
    from prunekit.space.budgets import Budget
    from prunekit.space.ladders import Space
    from prunekit.space.metrics import Metric, Parameters
    from prunekit.space.sites import Allocation, Site

_HOMES = {  # module: what of it is public
    "api": "compare evaluate prune tune",
    "calibration.moments": "Moments",
    "data.tokens": "TokenBatch",
    "engine.worker": "Worker",
    "errors": "NotVerified PluginError WrongInput",
    "layer.candidates": "Candidate best_groups best_weights ranked",
    "layer.problem": "LayerProblem",
    "layer.solving": "factored inverted solved",
    "layer.statistics": "MapShape Need Received Statistic Total",
    "layer.sublayer": "CutSubLayer SubLayer",
    "plugins.adapter": "ModelAdapter",
    "plugins.allocator": "Allocator Journal Problem Query Search Searched",
    "plugins.dense": "Dense",
    "plugins.engine": "Engine Opening Team",
    "plugins.exporter": "Exporter Inquiry Order Probe Product Response",
    "plugins.finisher": "Finisher Workpiece",
    "plugins.learner": "Decision Effort GateProblem GateQuery GateReply Learner Lesson Training",
    "plugins.metric": "MeasuredMetric Runs",
    "plugins.objective": "Answers Objective Reads",
    "plugins.options": "check_choices",
    "plugins.pruner": "LocalPruner",
    "plugins.signal": "Signal",
    "plugins.tracker": "Point Setting Track Tracker",
    "plugins.width": "ResidualStream Width",
    "recipe.resolve": "Parts resolve",
    "recipe.schema": "Recipe",
    "run.family": "Family",
    "run.results": "Result",
    "search.store": "CandidateStore",
    "search.supernet": "Supernet",
    "space.budgets": "Budget",
    "space.ladders": "Space",
    "space.metrics": "Metric Parameters",
    "space.sites": "Allocation Site",
}
_HOME_OF = {name: f"prunekit.{module}" for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Allocation", "Allocator", "Answers", "Budget", "Candidate", "CandidateStore", "CutSubLayer", "Decision", "Dense",
    "Effort", "Engine", "Exporter", "Family", "Finisher", "GateProblem", "GateQuery", "GateReply", "Inquiry",
    "Journal", "LayerProblem", "Learner", "Lesson", "LocalPruner", "MapShape", "MeasuredMetric", "Metric",
    "ModelAdapter", "Moments", "Need", "NotVerified", "Objective", "Opening", "Order", "Parameters", "Parts",
    "PluginError", "Point", "Probe", "Problem", "Product", "Query", "Reads", "Received", "Recipe", "ResidualStream",
    "Response", "Result", "Runs", "Search", "Searched", "Setting", "Signal", "Site", "Space", "Statistic", "SubLayer",
    "Supernet", "Team", "TokenBatch", "Total", "Track", "Tracker", "Training", "Width", "Worker", "Workpiece",
    "WrongInput", "best_groups", "best_weights", "check_choices", "compare", "evaluate", "factored", "inverted",
    "prune", "ranked", "resolve", "solved", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.arrange()  # so that transformers loads models whose layers differ in size
