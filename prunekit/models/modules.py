"""Module trees: copies that share parameters, and linear maps cut to some rows or columns."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from prunekit.models.classes import LowRank, NarrowHeads, NarrowValues

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)


def sliced(linear: nn.Linear, dim: Literal[0, 1], index: Tensor, source: Tensor | None = None) -> nn.Linear:
    """A linear map of the chosen rows or columns; `source` is sliced in place of its weight."""
    weight, bias = linear.weight, linear.bias
    picked = (weight if source is None else source).detach()
    picked = picked.index_select(dim, index.to(picked.device)).to(weight)
    small = type(linear)(picked.shape[1], picked.shape[0], bias=bias is not None, device="meta")
    small.weight = nn.Parameter(picked, weight.requires_grad)
    if bias is not None:
        kept = bias.detach().index_select(0, index.to(bias.device)) if dim == 0 else bias.detach().clone()
        small.bias = nn.Parameter(kept, bias.requires_grad)
    return small.train(linear.training)


def factored(linear: nn.Linear, left: Tensor, right: Tensor) -> LowRank:
    """Two linear maps in the place of one: right (r, d_in), then left (d_out, r) with the bias, which is shared."""
    small = low_rank(left, right, like=linear.weight)
    small.u.bias = linear.bias
    return small.train(linear.training)


def low_rank(left: Tensor, right: Tensor, *, like: Tensor) -> LowRank:
    """Two linear maps, right (r, d_in), then left (d_out, r), without a bias, of the dtype and device of another."""
    small = LowRank(right.shape[1], len(left), len(right), bias=False, device="meta")
    for part, factor in ((small.v, right), (small.u, left)):
        part.weight = nn.Parameter(factor.detach().to(like), like.requires_grad)
    return small


def narrowed_heads(
    values: nn.Linear, reading: nn.Linear, left: Tensor, right: Tensor
) -> tuple[NarrowValues, NarrowHeads]:
    """The map that makes values and the one behind attention, made for narrower values.

        W_v,g -> B_g W_v,g,   b_v,g -> B_g b_v,g,   W_o,h -> U_h        of every KV head g and its query heads h

    Args:
        values: W_v (KV heads · width, d).
        reading: W_o (d_out, query heads · width); its bias is shared.
        left: all U_h (d_out, r), side by side.
        right: all B_g (r, width), one below the other. What is made with them is rounded to their dtype, which is that
            of the checkpoint.
    """
    width, kv = right.shape[1], values.out_features // right.shape[1]
    query = reading.in_features // width
    bases = right.double().unflatten(0, (kv, -1))  # (KV heads, r, width)

    def turned(rows: Tensor) -> Tensor:
        made = bases @ rows.detach().to(bases).unflatten(0, (kv, width))
        return made.flatten(0, 1).to(right.dtype).to(rows)

    made, read = turned(values.weight), left.detach().to(reading.weight)
    small = nn.Linear(made.shape[1], len(made), bias=False, device="meta")
    small.weight = nn.Parameter(made, values.weight.requires_grad)
    if values.bias is not None:
        small.bias = nn.Parameter(turned(values.bias[:, None])[:, 0], values.bias.requires_grad)
    behind = nn.Linear(read.shape[1], len(read), bias=False, device="meta")
    behind.weight, behind.bias = nn.Parameter(read, reading.weight.requires_grad), reading.bias
    return NarrowValues(small, kv, width).train(values.training), NarrowHeads(behind, query, width).train(
        reading.training
    )


def shallow(module: M) -> M:
    """A copy of the module tree that shares every parameter, buffer and config."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    memo |= {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    return copy.deepcopy(module, memo)


def hollow(module: M) -> M:
    """A copy of the module tree without values: parameters and buffers of the same shapes, on the meta device."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to("meta"), requires_grad=False) for value in module.parameters()
    }
    memo |= {id(value): value.to("meta") for value in module.buffers()}
    return copy.deepcopy(module, memo)


def grafted(module: M, changed: Mapping[str, nn.Module]) -> M:
    """The module with other modules at some paths, itself as it was: whatever is not on the way to them is shared."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    inside: dict[str, dict[str, nn.Module]] = {}
    for path, other in changed.items():
        name, _, rest = path.partition(".")
        if rest:
            inside.setdefault(name, {})[rest] = other
        else:
            twin._modules[name] = other
    for name, below in inside.items():
        twin._modules[name] = grafted(module.get_submodule(name), below)
    return twin


def widen_tables(model: PreTrainedModel) -> None:
    """Make the tables of a model that were rounded to half precision with its weights anew, in float32."""
    for module in model.modules():
        rounded = [
            (name, table)
            for name, table in module.named_buffers(recurse=False)
            if table.dtype in (torch.bfloat16, torch.float16) and name in module._non_persistent_buffers_set
        ]
        for name, table in rounded:
            setattr(module, name, nn.Buffer(table.float(), persistent=False))
        if rounded:
            make_tables(model, module)


def take_tables(small: PreTrainedModel, model: nn.Module) -> None:
    """Give a model on the meta device the buffers that are in no state, such as rotary tables, those of another."""
    for path, module in small.named_modules():
        absent = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name, buffer in absent:
            table = model.get_buffer(f"{path}.{name}").to(buffer.dtype, copy=True)
            setattr(module, name, nn.Buffer(table, persistent=False))
        if absent:
            make_tables(small, module)  # anew: `model.to(torch.bfloat16)` would have rounded them


def make_tables(model: PreTrainedModel, module: nn.Module) -> None:
    """Let a model make the buffers of a module of its own anew, such as rotary tables; parameters stay as they are."""
    for parameter in module.parameters():  # also of its children, which some make anew beside their own
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model._init_weights(module)


def text_config(config: Any) -> Any:
    """The part of a config that is of the language model, which beside a model of images is one of several."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def say_tied(config: Any, shared: bool) -> None:
    """Let a config say whether head and embedding share their weight, also the part of it that is of the language
    model: where that alone says so, transformers takes it for both."""
    config.tie_word_embeddings = text_config(config).tie_word_embeddings = shared


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, as it was after."""
    was = model.training
    model.eval()
    yield
    model.train(was)
