"""Structured optimal brain surgeon: one pruner, several searches, and the papers that are cases of it."""

from prunekit_strategies.pruners.obs.obs import OBS
from prunekit_strategies.pruners.obs.papers import OSSCAR, SPAP, SlimGPT, Tyr, ZipLM

__all__ = ["OBS", "OSSCAR", "SPAP", "SlimGPT", "Tyr", "ZipLM"]
