"""The adapter of a model."""

from __future__ import annotations

from prunekit.plugins.adapter import ModelAdapter, UnsupportedModel
from prunekit.plugins.registry import ADAPTERS, UnknownName


def adapter_for(model_type: str) -> ModelAdapter:
    """The adapter of a `config.model_type`; pruned models of prunekit go by their family.

    Raises:
        UnsupportedModel: none is registered; lists those that are.
    """
    try:
        return ADAPTERS.build(model_type.removeprefix("prunekit_"))
    except UnknownName:
        there = ", ".join(ADAPTERS)
        raise UnsupportedModel(f"model type {model_type!r} has no adapter; supported are {there}") from None
