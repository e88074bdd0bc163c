"""One file per model family: the only place that knows module names."""

from prunekit.adapters.adapter import Cut, ModelAdapter, Transformer, UnsupportedModel, adapter_for

__all__ = ["Cut", "ModelAdapter", "Transformer", "UnsupportedModel", "adapter_for"]
