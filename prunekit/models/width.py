"""Residual width: a model whose residual stream has fewer channels, of the same class.

Everything that touches the stream is linear but its norms, x̂ = w ⊙ x / rms(x). An orthonormal basis Q (d, d) of the
stream turns embedding and outputs, x -> Qᵀ x, and what reads it, W diag(w) -> W diag(w) Q with w = 1 in its place; rms
is the same in every basis (SliceGPT, arXiv:2401.15024). Of the basis d' directions stay. Where the others are silent,
rms² over d' channels is d/d' times that over d, so that

    w' = √(d/d') w,    eps' = eps d'⁻¹ d        give the same x̂, exactly.

What else goes by the eps of the config, norms of queries and keys, gets inputs √(d/d') times as large.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.models.adapters.transformer import PARTS, Transformer
from prunekit.models.classes import LowRank
from prunekit.models.modules import take_tables
from prunekit.models.opening import stored_as
from prunekit.plugins.adapter import ModelAdapter, UnsupportedModel

Directions = Float[Tensor, "d d"] | Int64[Tensor, " d"]
"""An orthonormal basis, a direction in each column, or an order of the channels; the most important first."""


def check_narrow(model: PreTrainedModel, adapter: ModelAdapter) -> Transformer:
    """Find out whether the residual stream of a model can lose channels.

    Args:
        model: with weights or without.
        adapter: of its family.

    Returns:
        The adapter, of a family whose stream can.

    Raises:
        UnsupportedModel: says why not, and what can be removed instead.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    if not isinstance(adapter, Transformer):
        raise _refused(kind, "its blocks are no attention and MLP")
    family = adapter.family
    if adapter.images:
        raise _refused(kind, "features of images enter it, too")
    if family.experts is not None:
        raise _refused(kind, "experts and routers are not turned yet")
    if family.mixer is not None:
        raise _refused(kind, "mixers other than attention are not turned yet")
    norms = [found for _, _, found in _norms(model, adapter)]
    if any(isinstance(norm, nn.LayerNorm) or "LayerNorm" in type(norm).__name__ for norm in norms):
        raise _refused(kind, "its norms subtract the mean, which is another in another basis")
    if not family.narrow:
        raise _refused(kind, "norms of its class stand behind sub-layers, where weights per channel cannot be turned")
    if any(isinstance(module, LowRank) for module in adapter.blocks(model).modules()):
        raise _refused(kind, "its linear maps are of low rank already")
    return adapter


def _refused(kind: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the residual width of models of type {kind!r} stays as it is: {why}; leave width away and remove groups"
    )


def widths(model: PreTrainedModel, adapter: Transformer, step: int) -> list[int]:
    """The widths that a model of the same class can have, ascending, the last its own.

    Args:
        model: with weights or without.
        adapter: of its family.
        step: of what a smaller width is a multiple; classes may ask for more, such as a multiple of the heads.
    """
    own = int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator, union-attr]
    smaller = (width for width in range(step, own, step) if _config(model, adapter, width) is not None)
    return [*smaller, own]


def narrow_shape(model: PreTrainedModel, adapter: Transformer, width: int, *, rotated: bool) -> PreTrainedModel:
    """Make the skeleton of a model of a smaller width, on the meta device.

    Args:
        model: with weights or without.
        adapter: of its family.
        width: one of `widths`.
        rotated: whether its basis turns, so that embedding and head are two matrices.
    """
    config = _config(model, adapter, width)
    assert config is not None
    if rotated:
        config.tie_word_embeddings = False
    with torch.device("meta"):
        small: PreTrainedModel = type(model)(config)
    return stored_as(small, model.dtype).eval().requires_grad_(False)


@torch.no_grad()
def narrowed(
    model: PreTrainedModel, adapter: Transformer, directions: Directions, width: int, dtype: torch.dtype
) -> PreTrainedModel:
    """Make a model of the same class whose residual stream has `width` channels.

    Args:
        model: whole, in memory; it is not changed, and shares with the result what is the same.
        adapter: of its family.
        directions: the first `width` of them stay.
        width: one of `widths`.
        dtype: of the checkpoint: weights are rounded to it, once, from float64.

    Returns:
        The model, in the dtype of `model`. With a basis, its norms have weights of one, and its head is a matrix of its
        own.
    """
    small = narrow_shape(model, adapter, width, rotated=directions.ndim == 2)
    state = dict(model.state_dict())
    for name, value in _changed(model, adapter, directions, width):
        state[name] = value.to(dtype).to(state[name]).contiguous()
    head = _path(model, model.get_output_embeddings())
    if directions.ndim == 1 and model.config.tie_word_embeddings:
        state[f"{head}.weight"] = state[f"{_path(model, model.get_input_embeddings())}.weight"]
    small.load_state_dict({name: state[name] for name in small.state_dict()}, assign=True)
    take_tables(small, model)
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    small.config._name_or_path = model.config._name_or_path
    return small.train(model.training).requires_grad_(False)


def _changed(
    model: PreTrainedModel, adapter: Transformer, directions: Directions, width: int
) -> Iterator[tuple[str, Tensor]]:
    """The parameters that are others, by name, in float64."""
    family, prefix = adapter.family, adapter.layers
    own = len(directions)
    loud, turns = math.sqrt(own / width), directions.ndim == 2  # √(d/d')
    some = directions[:, :width].double() if turns else directions[:width]

    def read(value: Tensor, norm: Tensor, scale: float) -> Tensor:
        """What reads the stream behind a norm."""
        if not turns:
            return scale * value.double()[:, some.to(value.device)]
        return scale * loud * (value.double() * norm.double()) @ some.to(value.device)

    def written(value: Tensor) -> Tensor:
        """What writes into the stream: its first dimension is that of the stream."""
        place = some.to(value.device)
        return place.T @ value.double() if turns else value.double()[place]

    for path, part, norm in _norms(model, adapter):
        weight = norm.get_parameter("weight")
        kept = weight.double()[some.to(weight.device)] * loud if not turns else torch.ones(width, device=weight.device)
        yield f"{path}.weight", kept
        if part is None:
            continue
        index, which = part
        block, at = adapter.blocks(model)[index], f"{prefix}.{index}"
        attention = block.get_submodule(family.attention) if which == "attention" else None
        for reader in family.producers(which):  # type: ignore[arg-type]
            normed = attention is not None and _is_normed(attention, reader)
            linear, scale = block.get_submodule(reader), loud if normed else 1.0
            yield f"{at}.{reader}.weight", read(linear.get_parameter("weight"), weight, scale)
            if normed and linear.bias is not None:
                yield f"{at}.{reader}.bias", scale * linear.get_parameter("bias").double()
        writer = family.columns[which]  # type: ignore[index]
        linear = block.get_submodule(writer)
        yield f"{at}.{writer}.weight", written(linear.get_parameter("weight"))
        if linear.bias is not None:
            yield f"{at}.{writer}.bias", written(linear.get_parameter("bias"))
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    final = _norms_of(model, adapter)[-1][1].get_parameter("weight")
    yield f"{_path(model, embedding)}.weight", written(embedding.weight.T).T
    if turns or head.weight is not embedding.weight:
        yield f"{_path(model, head)}.weight", read(head.weight, final, 1.0)


def _is_normed(attention: nn.Module, path: str) -> bool:
    """Whether what a linear map in front of attention makes, queries or keys, goes through a norm."""
    name = path.rpartition(".")[2]
    return name in ("q_proj", "k_proj") and getattr(attention, f"{name[0]}_norm", None) is not None


def _norms_of(model: PreTrainedModel, adapter: Transformer) -> list[tuple[str, nn.Module]]:
    return [(path, norm) for path, _, norm in _norms(model, adapter)]


def norms(model: PreTrainedModel, adapter: Transformer) -> list[nn.Module]:
    """The modules that read the residual stream, in order of execution, the one in front of the head last."""
    return [norm for _, norm in _norms_of(model, adapter)]


def _norms(model: PreTrainedModel, adapter: Transformer) -> list[tuple[str, tuple[int, str] | None, nn.Module]]:
    """(path, (block, part) that it stands before, module) of every norm of the stream; None: the head."""
    found: list[tuple[str, tuple[int, str] | None, nn.Module]] = []
    for index, block in enumerate(adapter.blocks(model)):
        for part in PARTS:
            for name in adapter.family.norms.get(part, ()):
                if part not in adapter.dropped(block) and (norm := getattr(block, name, None)) is not None:
                    found.append((f"{adapter.layers}.{index}.{name}", (index, part), norm))
    final = adapter.final[0]
    return [*found, (final, None, model.get_submodule(final))]


def _path(model: nn.Module, module: Any) -> str:
    return next(path for path, each in model.named_modules() if each is module)


def _config(model: PreTrainedModel, adapter: Transformer, width: int) -> Any:
    """The config of a width; None: the class of the model allows none."""
    config: Any = copy.deepcopy(model.config)
    own, block = config.hidden_size, _present(model, adapter)
    config.hidden_size, config.head_dim = width, adapter.head_dim(block)
    config.rms_norm_eps = config.rms_norm_eps * own / width
    try:
        config.validate()
    except (StrictDataclassError, ValueError):
        return None
    return config


def _present(model: PreTrainedModel, adapter: Transformer) -> nn.Module:
    blocks: Sequence[nn.Module] = list(adapter.blocks(model))
    return next((block for block in blocks if "attention" not in adapter.dropped(block)), blocks[0])
