"""Blocks on several devices: what a block is given follows it to its device, and what it makes goes to the next.

Hidden states before a block are where the block is, behind the last one at home: with the embeddings, final norm and
head, and all that is made of logits. Nobody else needs to know where a block is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.errors import WrongInput
from prunekit.plugins.adapter import ModelAdapter


@dataclass(frozen=True)
class Border:
    """Where a block is, and where its output goes."""

    here: torch.device
    there: torch.device

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """A forward pre-hook: masks and positions come along."""
        return moved(args, self.here), moved(kwargs, self.here)

    def leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook."""
        return moved(output, self.there)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors of a nested value on a device; anything else, a cache say, as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(each, device) for each in value)
    if type(value) is dict:
        return {key: moved(each, device) for key, each in value.items()}
    return value


def dealt_out(sizes: Sequence[int], devices: Sequence[torch.device]) -> list[torch.device]:
    """The device of every block: neighbours together, about the same number of bytes on each device.

    Args:
        sizes: bytes of the blocks, in order of execution.
        devices: at least one.
    """
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
    total = max(1, sum(sizes))
    return [devices[min(len(devices) - 1, int(len(devices) * middle / total))] for middle in middles]


def spread(model: nn.Module, adapter: ModelAdapter, places: Sequence[torch.device]) -> None:
    """Let hidden states follow the blocks of a model, whose parameters are there already or are read there.

    Args:
        model: changed in place.
        adapter: of its family.
        places: the device of every block; everything else is where the first is.
    """
    if len({*places}) == 1:
        return
    behind = [*places[1:], places[0]]
    for block, here, there in zip(adapter.blocks(model), places, behind, strict=True):
        border = Border(here, there)
        block.register_forward_pre_hook(border.enter, prepend=True, with_kwargs=True)
        block.register_forward_hook(border.leave)


def place_of(block: nn.Module, home: torch.device) -> torch.device:
    """Where a block is, of a model that was spread or not."""
    borders = filter(None, map(_border, block._forward_hooks.values()))
    return next((border.here for border in borders), home)


def gather(model: nn.Module, device: torch.device) -> None:
    """Bring a model that was spread, or not, to one device, in place."""
    for module in model.modules():
        hooks: list[dict[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
        for those in hooks:
            for key in [key for key, hook in those.items() if _border(hook) is not None]:
                del those[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    model.to(device)


def placed(model: PreTrainedModel, adapter: ModelAdapter) -> list[torch.device]:
    """The device of every block of a model in memory, as it was loaded.

    Raises:
        WrongInput: a part of it is on no device, but offloaded.
    """
    if lost := [name for name, value in model.named_parameters() if value.is_meta]:
        raise WrongInput(
            f"{lost[0]} of the model in memory is offloaded, say by device_map; name the model's folder instead, and "
            "prunekit itself reads block by block what does not fit"
        )
    home = next(model.parameters()).device
    return [next((p.device for p in block.parameters()), home) for block in adapter.blocks(model)]


def settle(model: PreTrainedModel, adapter: ModelAdapter, places: Sequence[torch.device]) -> None:
    """Put a copy of a model in memory on devices, in place; the hooks of its loader are replaced by our own.

    Args:
        model: loaded with or without `device_map`.
        adapter: of its family.
        places: the device of every block, or of all that there is; everything else comes to the first.
    """
    if vars(model).pop("hf_device_map", None) is not None:
        from accelerate.hooks import remove_hook_from_submodules  # which is there: it has placed the model

        remove_hook_from_submodules(model)
        for name in [name for name in vars(model) if callable(getattr(type(model), name, None))]:
            delattr(model, name)  # `to` and the like, which move the model that was copied
        for module in model.modules():
            vars(module).pop("forward", None)  # bound to this module: copies that are cut would run it
    if len({*places}) == 1:
        model.to(places[0])  # type: ignore[arg-type]
        return
    blocks = adapter.blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            _move_own(module, places[0])
    for block, place in zip(blocks, places, strict=True):
        block.to(place)
    model.tie_weights()
    spread(model, adapter, places)


def _move_own(module: nn.Module, device: torch.device) -> None:
    """The parameters and buffers of a module, not those of its children."""
    module._apply(lambda tensor: tensor.to(device), recurse=False)


def _border(hook: Any) -> Border | None:
    found = getattr(hook, "__self__", None)
    return found if isinstance(found, Border) else None
