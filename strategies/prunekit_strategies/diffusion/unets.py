"""The operators of a U-Net that can be removed whole, what takes their place, and classes that load what is left.

diffusers imports this module by the name that `model_index.json` of a result has for the U-Net, so that
`DiffusionPipeline.from_pretrained` loads it where prunekit is installed. It imports torch and diffusers alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

__all__ = ["ConfigMixin", "ModelMixin", "PrunedUNet2DConditionModel", "PrunedUNet2DModel"]  # diffusers looks them up

Kind = Literal["resnet", "self-attention", "cross-attention", "feed-forward"]
SIDES = ("down_blocks", "mid_block", "up_blocks")  # in order of execution


@dataclass(frozen=True)
class Operator:
    """A residual branch of a U-Net: what it adds to its input can be left out."""

    name: str  # module path
    kind: Kind
    block: int  # of the U-Net, in order of execution
    parameters: int  # that leave with it, those of its norm included


class Shortcut(nn.Module):
    """What is left of a residual block: its input, resampled and projected where the block changes the shape."""

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.resample = block.upsample if block.upsample is not None else block.downsample  # without parameters
        self.conv_shortcut = block.conv_shortcut  # by the block's own name, so that weights keep theirs
        self.output_scale_factor = block.output_scale_factor

    def forward(self, x: Tensor, temb: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        x = x if self.resample is None else self.resample(x)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x / self.output_scale_factor


class PassedOn(nn.Module):
    """What is left of an attention layer that adds its input itself."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.rescale_output_factor = attention.rescale_output_factor

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x / self.rescale_output_factor


class Nothing(nn.Module):
    """What is left of a layer whose output is added by the block around it."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


def operators(unet: nn.Module) -> list[Operator]:
    """The operators that can be removed, block by block in order of execution.

    Residual blocks, their convolutions, norms and projection of the time step; attention and feed-forward layers of
    transformer blocks with their norms; attention layers that stand alone. What changes the resolution stays, and so
    do what is removed already and variants with other norms, which have further inputs.
    """
    found, number = list[Operator](), 0
    for side in SIDES:
        part = getattr(unet, side, None)
        for block in () if part is None else part if isinstance(part, nn.ModuleList) else (part,):
            inside = f"{side}.{list(part).index(block)}" if isinstance(part, nn.ModuleList) else side
            for path, module in block.named_modules(prefix=inside):
                found += [
                    Operator(name, kind, number, sum(_sizes(unet, _leaving(unet, name))))
                    for name, kind in _of_module(path, module)
                ]
            number += 1
    return found


def _of_module(path: str, module: nn.Module) -> Iterator[tuple[str, Kind]]:
    if type(module) is ResnetBlock2D:
        yield path, "resnet"
    elif type(module) is BasicTransformerBlock and module.norm_type == "layer_norm":
        if isinstance(module.attn1, Attention):
            yield f"{path}.attn1", "cross-attention" if module.only_cross_attention else "self-attention"
        if isinstance(module.attn2, Attention):
            yield f"{path}.attn2", "cross-attention" if module.attn2.is_cross_attention else "self-attention"
        if not isinstance(module.ff, Nothing):
            yield f"{path}.ff", "feed-forward"
    elif type(module) is Attention and module.residual_connection:
        yield path, "self-attention"


def _leaving(unet: nn.Module, name: str) -> dict[str, nn.Module]:
    """What takes the place of an operator: module path -> module."""
    module = unet.get_submodule(name)
    if isinstance(module, ResnetBlock2D):
        return {name: Shortcut(module)}
    if isinstance(module, Attention) and module.residual_connection:
        return {name: PassedOn(module)}
    around, _, last = name.rpartition(".")
    norm = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}[last]
    return {name: Nothing(), f"{around}.{norm}": nn.Identity()}


def _sizes(unet: nn.Module, places: Mapping[str, nn.Module]) -> Iterator[int]:
    """Parameters that leave with every module, less those that its place keeps."""
    for path, module in places.items():
        yield count(unet.get_submodule(path)) - count(module)


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def remove(unet: nn.Module, names: Iterable[str]) -> None:
    """Remove operators in place.

    Args:
        unet: has them.
        names: of operators.
    """
    for name in names:
        for path, module in _leaving(unet, name).items():
            unet.set_submodule(path, module)


@contextmanager
def without(unet: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Run a U-Net as if operators were removed; it is as it was afterwards."""
    places = {path: module for name in names for path, module in _leaving(unet, name).items()}
    before = {path: unet.get_submodule(path) for path in places}
    try:
        for path, module in places.items():
            unet.set_submodule(path, module.train(unet.training))
        yield
    finally:
        for path, module in before.items():
            unet.set_submodule(path, module)


class _Pruned:
    """Adds to a class of diffusers the key `removed` of its config: operators that it is built without."""

    def __init__(self, *args: Any, removed: Sequence[str] = (), **more: Any) -> None:
        super().__init__(*args, **more)
        self.register_to_config(removed=list(removed))  # type: ignore[attr-defined]
        remove(self, removed)  # type: ignore[arg-type]

    def __init_subclass__(cls) -> None:
        """Let the constructor say the parameters of the class it extends: diffusers reads configs by them."""
        super().__init_subclass__()

        def init(self: Any, *args: Any, **more: Any) -> None:
            _Pruned.__init__(self, *args, **more)

        own = inspect.Parameter("removed", inspect.Parameter.KEYWORD_ONLY, default=())
        stock = inspect.signature(cls.__mro__[2].__init__)
        init.__signature__ = stock.replace(parameters=[*stock.parameters.values(), own])  # type: ignore[attr-defined]
        cls.__init__ = init  # type: ignore[method-assign]


class PrunedUNet2DConditionModel(_Pruned, UNet2DConditionModel):
    """A U-Net with conditions, built without the operators that `removed` of its config names."""


class PrunedUNet2DModel(_Pruned, UNet2DModel):
    """A U-Net without conditions, built without the operators that `removed` of its config names."""


CLASSES: Mapping[type[Any], type[Any]] = {
    UNet2DConditionModel: PrunedUNet2DConditionModel,
    PrunedUNet2DConditionModel: PrunedUNet2DConditionModel,
    UNet2DModel: PrunedUNet2DModel,
    PrunedUNet2DModel: PrunedUNet2DModel,
}
"""Class of a U-Net -> class of the pruned one."""


def pruned(unet: ModelMixin, names: Iterable[str]) -> ModelMixin:
    """A smaller U-Net of its own, with the weights that stay.

    Args:
        unet: of a class in `CLASSES`; it is left as it was.
        names: of operators to remove.
    """
    removed = [*unet.config.get("removed", ()), *names]
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")} | {"removed": removed}
    first = next(iter(unet.parameters()))
    small = CLASSES[type(unet)].from_config(config)
    nn.Module.to(small, device=first.device, dtype=first.dtype)  # diffusers' own warns of every dtype
    kept = small.state_dict().keys()
    small.load_state_dict({key: value for key, value in unet.state_dict().items() if key in kept})
    return small.train(unet.training)
