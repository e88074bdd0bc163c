"""Devices that are not there: tensors say they are on them, and what mixes two of them fails as it would on CUDA.

    with pretended_devices():
        x = torch.ones(2, device="cpu:1")
        x + torch.ones(2)                      # RuntimeError: expected all tensors to be on the same device
        x.cpu() + torch.ones(2)                # fine

Within, `cpu` is the host and `cpu:0`, `cpu:1` ... are devices of their own. Values are computed by the same kernels on
the same numbers, so that they are the same to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

HOST = torch.device("cpu")
_aten = torch.ops.aten
_TRANSFERS = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}


class Elsewhere(torch.Tensor):
    """A tensor on a device that is not there; its values are those of `on_host`."""

    on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Elsewhere:
        self: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        self.on_host = inner
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        copied = Elsewhere(self.on_host.clone(), self.device).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copied
        return copied  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Python(TorchFunctionMode):
    """What reads or replaces memory without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # believes a device that is called cpu
            return func(args[0].cpu())
        if func == Tensor.data.__set__ and any(isinstance(value, Elsewhere) for value in args):  # type: ignore[attr-defined]
            _replace(*args)
            return None
        if func in (torch.tensor, torch.as_tensor) and kwargs and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])  # made on the host, unseen
        return func(*args, **(kwargs or {}))


class _Pretended(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_devices() -> Iterator[None]:
    """Within, `cpu:0`, `cpu:1` ... are devices of their own, in threads that are started there too."""
    run = threading.Thread.run

    def inside(self: threading.Thread) -> None:
        with _Python(), _Pretended():
            run(self)

    threading.Thread.run = inside  # type: ignore[method-assign]
    try:
        with _Python(), _Pretended():
            yield
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]


def _replace(held: Tensor, value: Tensor) -> None:
    """`held.data = value`: the same object, on the other device."""
    if isinstance(held, Elsewhere) and isinstance(value, Elsewhere) and held.device == value.device:
        func: Any = Tensor.data.__set__  # type: ignore[attr-defined]
        with torch._C.DisableTorchFunction():
            func(held, value)
        held.on_host = value.on_host
        return
    other = value.detach().requires_grad_(held.requires_grad)
    other = nn.Parameter(other, held.requires_grad) if isinstance(held, nn.Parameter) else other
    torch.utils.swap_tensors(held, other)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values, its result on the device of what it was made of."""
    asked = kwargs.get("device")
    flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    if func in _TRANSFERS:
        device = args[0].device if asked is None else torch.device(asked)
    else:
        device = torch.device(asked) if asked is not None else _device(func, args, flat)
    if device.type == "meta" or any(value.is_meta for value in flat):
        return func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if device.type != "cpu":
        raise RuntimeError(f"no device {device} is pretended")
    inside = dict(tree_map(_inner, kwargs))
    if asked is not None:
        inside["device"] = HOST
    made = func(*tree_map(_inner, args), **inside)
    if device == HOST:
        return made
    found = tree_map(lambda value: Elsewhere(value, device) if isinstance(value, Tensor) else value, made)
    return return_and_correct_aliasing(func, args, kwargs, found)


def _device(func: Any, args: Any, flat: list[Tensor]) -> torch.device:
    """The one device of all tensors; those of no dimension, and indices, may be on the host.

    Raises:
        RuntimeError: there are two.
    """
    counted = flat
    if func in _INDEXED:
        counted = [value for value in (args[0], *args[2:]) if isinstance(value, Tensor)]
        counted += [value for value in args[1] if isinstance(value, Elsewhere)]
    devices = {value.device for value in counted if value.ndim or value.device != HOST}
    if len(devices) > 1:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"expected all tensors to be on the same device, but {func} found {names}")
    return devices.pop() if devices else HOST


def _inner(value: Any) -> Any:
    return value.on_host if isinstance(value, Elsewhere) else value
