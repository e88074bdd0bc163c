"""LD-Pruner on the U-Net of a diffusers pipeline: whole operators are removed. Needs the extra prunekit[diffusers]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit_strategies.diffusion.prune import prune_pipeline

__all__ = ["prune_pipeline"]


def __getattr__(name: str) -> Any:
    """Import it where it is used: who loads a pruned pipeline needs `unets` alone, and not prunekit's core."""
    if name != "prune_pipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prunekit_strategies.diffusion.prune import prune_pipeline

    return prune_pipeline
