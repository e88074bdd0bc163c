"""Prune language models: any pruner, any allocator, any objective; a smaller model that loads anywhere."""

from prunekit import modeling
from prunekit.api import prune, tune
from prunekit.calibration.moments import Moments
from prunekit.calibration.tokens import TokenBatch
from prunekit.checkpoint import Dense
from prunekit.contracts import (
    Allocator,
    Engine,
    Finisher,
    Journal,
    LocalPruner,
    Objective,
    Problem,
    Query,
    Search,
    Signal,
    Workpiece,
)
from prunekit.errors import PluginError, WrongInput
from prunekit.family import Family
from prunekit.layer import Candidate, LayerProblem, best_groups, best_weights, ranked
from prunekit.options import check_choices
from prunekit.pipeline import Result
from prunekit.recipe import Recipe
from prunekit.sites import Allocation, Budget, Site, Space
from prunekit.solving import factored, inverted, solved
from prunekit.store import CandidateStore
from prunekit.supernet import Supernet
from prunekit.team import Opening, Team, Worker

__all__ = [
    "Allocation",
    "Allocator",
    "Budget",
    "Candidate",
    "CandidateStore",
    "Dense",
    "Engine",
    "Family",
    "Finisher",
    "Journal",
    "LayerProblem",
    "LocalPruner",
    "Moments",
    "Objective",
    "Opening",
    "PluginError",
    "Problem",
    "Query",
    "Recipe",
    "Result",
    "Search",
    "Signal",
    "Site",
    "Space",
    "Supernet",
    "Team",
    "TokenBatch",
    "Worker",
    "Workpiece",
    "WrongInput",
    "best_groups",
    "best_weights",
    "check_choices",
    "factored",
    "inverted",
    "prune",
    "ranked",
    "solved",
    "tune",
]

modeling.register()  # so that transformers loads models whose layers differ in size
