"""What is asked of every plug-in: to leave what it was given as it was, and to answer with what its contract says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunekit.errors import PluginError

T = TypeVar("T")
VALUES_AT_ONCE = 2**20  # that are summed together
IN_CACHE = 2**15  # of those, on a processor that reads them twice
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by bytes


@contextmanager
def unchanged(plugin: object, where: str = "", *, values: bool = False, **given: Any) -> Iterator[None]:
    """Within, a plug-in works on what it was given.

    Args:
        plugin: who.
        where: it works, for the message.
        values: whether sums over all values and their places are compared too, which see what `tensor.data` hides; else
            versions alone.
        given: tensors, modules, and what holds some, by name.

    Raises:
        PluginError: a tensor is not as it was, or it asked for the end of the process.
    """
    before = {name: (tensor, _mark(tensor, values=values)) for name, tensor in _tensors(given)}
    try:
        yield
    except SystemExit as error:
        who = type(plugin).__name__
        raise PluginError(f"a plug-in would end the process (SystemExit: {error.code}), while {who} worked") from error
    after = dict(_tensors(given))
    for name, (tensor, mark) in before.items():
        if name in after and (after[name] is not tensor or _mark(tensor, values=values) != mark):
            on = f" on {where}" if where else ""
            raise PluginError(f"{type(plugin).__name__}{on} changed {name}, which it was given only to be read")


def instance(plugin: object, what: str, value: Any, kind: type[T] | tuple[type[Any], ...]) -> T:
    """What a plug-in has answered, if it is of the kind that was asked.

    Raises:
        PluginError: it is not.
    """
    if not isinstance(value, kind):
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise PluginError(f"{type(plugin).__name__}: {what} is {_shown(value)}, and {kinds} was asked")
    return value  # type: ignore[return-value]


def number(plugin: object, what: str, value: Any) -> float:
    """What a plug-in has answered as a number, finite or not.

    Raises:
        PluginError: it is none.
    """
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise PluginError(f"{type(plugin).__name__}: {what} is {_shown(value)}, and one number was asked")


def _shown(value: Any) -> str:
    return f"{repr(value)[:60]} ({type(value).__name__})"


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a value, by the path to them."""
    inside: Any = ()
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        inside = [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]
    elif isinstance(value, Mapping):
        inside = list(value.items())
    elif isinstance(value, (tuple, list)):
        inside = enumerate(value)
    elif dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
        inside = list(vars(value).items())
    for key, part in inside:
        yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _mark(tensor: Tensor, *, values: bool) -> tuple[int, ...]:
    if tensor.is_meta:
        return (0,)
    version = 0 if tensor.is_inference() else tensor._version
    if not values:
        return version, tensor.data_ptr()
    bits = tensor.detach().contiguous().view(_BITS.get(tensor.element_size(), torch.int8)).flatten()
    if len(bits) * bits.element_size() % 8 == bits.storage_offset() * bits.element_size() % 8 == 0:
        bits = bits.view(torch.int64)  # several at once, and none has to be made wide to be summed
    # some at a time: a sum of narrow integers first makes all of them wide
    together = VALUES_AT_ONCE if bits.is_cuda else IN_CACHE
    places = 2 * torch.arange(min(len(bits), together), device=bits.device) + 1
    sums = ((int(some.sum()), int((some * places[: len(some)]).sum())) for some in bits.split(together))
    return version, tensor.data_ptr(), *(one for both in sums for one in both)
