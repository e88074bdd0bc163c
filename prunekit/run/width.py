"""The first step of a recipe with a width: the dense model with a narrower residual stream, which is then pruned."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prunekit.calibration.stream import collect_stream
from prunekit.data.tokens import TokenBatch
from prunekit.errors import PluginError
from prunekit.models.opening import fingerprint
from prunekit.models.width import check_narrow, narrowed
from prunekit.plugins.dense import Dense
from prunekit.plugins.guard import instance, unchanged
from prunekit.plugins.width import Width
from prunekit.recipe.resolve import Parts
from prunekit.run.clock import Clock
from prunekit.run.spaces import narrow_space
from prunekit.system.progress import Progress

ORTHONORMAL = 1e-8  # that products of directions may be off


def narrow(parts: Parts, dense: Dense, tokens: TokenBatch, shelf: Path, progress: Progress, clock: Clock) -> Dense:
    """Narrow the residual stream of a model as far as the budget says.

    Args:
        parts: of a recipe with a width.
        dense: the model; it is not changed.
        tokens: of calibration.
        shelf: folder for statistics that other runs over the model may share.
        progress: advanced while statistics are taken.
        clock: whose seconds it takes.

    Returns:
        A model of the same class, which is pruned in the place of `dense`.

    Raises:
        WrongInput: as `narrow_space`.
        PluginError: the width broke its contract.
    """
    plugin, adapter = parts.width, check_narrow(dense.model, dense.adapter)
    assert plugin is not None
    width, _ = narrow_space(parts, dense.model, adapter, dense.dtype)
    place = shelf / f"stream-{_name(dense.fingerprint, tokens.digest, str(plugin.turns))}"
    with clock("width"):
        stream = collect_stream(dense.model, adapter, tokens, place, progress, gram=plugin.turns)
        with unchanged(plugin, values=True, model=dense.model, stream=stream):
            directions = checked(plugin, plugin.directions(stream), stream.absolute.shape[1])
        model = narrowed(dense.model, adapter, directions, width, dense.dtype)
    progress.say(f"the residual stream has {width:,} of {len(directions):,} channels")
    return replace(dense, model=model, fingerprint=fingerprint(model), converted={})


def checked(plugin: Width, found: object, width: int) -> Tensor:
    """What a width has answered, as its contract says: an order of so many channels, or a basis.

    Raises:
        PluginError: it is neither.
    """
    who, given = type(plugin).__name__, instance(plugin, "its directions", found, Tensor)
    if not plugin.turns:
        if given.dtype != torch.int64 or sorted(given.tolist() if given.ndim == 1 else ()) != list(range(width)):
            raise PluginError(f"{who}: an order names each of {width} channels once, in int64")
        return given
    if given.dtype != torch.float64 or given.shape != (width, width):
        raise PluginError(f"{who}: a basis is {(width, width)} in float64, not {tuple(given.shape)} in {given.dtype}")
    off = float((given.T @ given - torch.eye(width, dtype=given.dtype)).abs().max())
    if not off <= ORTHONORMAL:
        raise PluginError(f"{who}: its basis is not orthonormal, products of directions are off by {off:.3g}")
    return given


def _name(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
