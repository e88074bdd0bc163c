"""Checkpoints read and written tensor by tensor: what is larger than memory never is in memory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunekit.errors import CannotGoOn, WrongInput, one_line

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = "50GB"  # the largest file of an export: what transformers makes by itself

NAMES = {  # of dtypes in a file; the order of equal alignment is safetensors' own
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
SCALES = ("weight_scale", "weight_zero_point")  # names begin so of what quantized weights are multiplied by
OF_ADAPTERS = re.compile(r"\.(base_layer|lora_\w+)\b")  # names of peft


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, unread."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    state: tuple[int, int]  # of its file: bytes, and when it was last changed


@dataclass(frozen=True, eq=False)
class Shards:
    """The tensors of a checkpoint in safetensors files, by name."""

    source: str
    files: tuple[Path, ...]

    @classmethod
    def of(cls, path: str, source: str | None = None) -> Shards:
        """Those of a folder, or of a hub id, whose files are fetched if they are not there.

        `source` is what the user calls it.

        Raises:
            WrongInput: it cannot be had, or holds no safetensors.
        """
        source = source or path
        folder = Path(path).expanduser()
        if not folder.exists():
            try:
                folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
            except Exception as error:
                raise WrongInput(f"{source!r} is not a model that can be opened: {one_line(error)}") from error
        names = [WEIGHTS]
        if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():  # as transformers looks for them
            names = files_of_index(folder / INDEX)
        files = tuple(folder / name for name in names)
        if gone := [file.name for file in files if not file.exists()]:
            why = "block by block only checkpoints in safetensors can be read"
            if names != [WEIGHTS]:
                why = f"which {INDEX} names; fetch the model again"
            raise WrongInput(f"{source!r} has no {gone[0]}{',' if names != [WEIGHTS] else ';'} {why}")
        return cls(source, files)

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """What there is, from the headers of the files.

        Raises:
            WrongInput: a file is damaged.
        """
        found = {}
        for file in self.files:
            try:
                state = _state(file)
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  it is no mapping
                        part = opened.get_slice(name)
                        check_stored(name, part.get_dtype(), self.source)
                        if name in found:
                            raise WrongInput(
                                f"{self.source!r} holds {name} twice, in {found[name].file.name} and {file.name}; "
                                "remove one of them, or fetch the model again"
                            )
                        found[name] = Stored(file, DTYPES[part.get_dtype()], tuple(part.get_shape()), state)
            except (OSError, SafetensorError, KeyError) as error:
                raise WrongInput(f"{file} cannot be read: {one_line(error)}; fetch it again") from error
        return found

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor, as it is stored.

        Its file is opened for it alone: what was mapped to read it counts as memory until the file is closed.

        Raises:
            CannotGoOn: the file is no longer what it was when its header was read.
        """
        stored = self.tensors[name]
        try:
            if _state(stored.file) == stored.state:
                with safe_open(stored.file, "pt") as opened:
                    return opened.get_tensor(name).to(device, copy=True)
        except (OSError, SafetensorError):
            pass
        raise CannotGoOn(f"{stored.file} was changed or removed while it was in use; begin again with it as it was")


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def files_of_index(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        WrongInput: it names none.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if names and all(map(_is_inside, names)):
            return names
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    raise WrongInput(f"{index} does not say which tensor is in which file beside it; it is damaged, fetch it again")


def _is_inside(name: str) -> bool:
    """Whether a path leads nowhere but into the folder that it starts from."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def is_packed(name: str, dtype: str) -> bool:
    """Whether a tensor of a file is no plain weight: of 8 bits or fewer, or a weight in integers."""
    dtype, part = dtype.removeprefix("torch.").lower(), name.rpartition(".")[2]
    whole = dtype.startswith(("i", "u", "qint", "quint", "bool")) and "weight" in part
    return whole or part.startswith(SCALES) or re.match(r"(f|float)[468](_|\b)", dtype) is not None


def check_stored(name: str, dtype: str, source: str) -> None:
    """Refuse a tensor of a file that is no plain weight of a model.

    Raises:
        WrongInput: it is quantized, or of an adapter.
    """
    if is_packed(name, dtype):
        raise quantized(source, f"{name} is {dtype}")
    if OF_ADAPTERS.search(name):
        raise adapter(source, name)


def adapter(source: str, what: str, base: object = None) -> WrongInput:
    """The sentence for an adapter that is refused, with the file or tensor that it is known by."""
    of = f"for {base!r}" if base else "and does not say for which model"
    return WrongInput(
        f"{source!r} holds an adapter {of} ({what}); merge it into its model, with merge_and_unload() of peft, and "
        "prune what that gives"
    )


def quantized(source: str, how: str) -> WrongInput:
    """The sentence for a checkpoint that is refused, with how it is quantized."""
    return WrongInput(
        f"{source!r} is quantized ({how}), and only plain weights can be pruned; take the checkpoint it was made from, "
        "and quantize the result"
    )


def header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a safetensors file of these, byte for byte as the library writes it."""
    parts: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in placed(tensors):
        dtype, shape = tensors[name]
        begin, end = end, end + _bytes(dtype, shape)
        parts[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(parts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> int:
    """Of the file that `safetensors.torch.save_file` makes of tensors of these dtypes and shapes."""
    return len(header(tensors)) + sum(_bytes(dtype, shape) for dtype, shape in tensors.values())


def placed(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> list[str]:
    """Names in the order of the file: wide dtypes first, then by name."""
    order = {dtype: rank for rank, dtype in enumerate(NAMES)}
    return sorted(tensors, key=lambda name: (-order[tensors[name][0]], name.encode()))


def write(
    folder: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor], *, shard_bytes: str | int = SHARD_BYTES
) -> None:
    """Write a checkpoint as transformers does, its files and their index, holding one tensor at a time.

    Args:
        folder: of the checkpoint.
        tensors: say names, dtypes and shapes, on the meta device or not.
        read: gives each when its turn comes.
        shard_bytes: of the largest file.
    """
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(meta, filename_pattern=pattern, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        here = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}
        _written(folder / file, header(here, {"format": "pt"}), (read(name) for name in placed(here)))
    if split.is_sharded:
        parameters = sum(tensor.numel() for tensor in tensors.values())
        index = {
            "metadata": {"total_parameters": parameters, **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _written(file: Path, begin: bytes, tensors: Iterable[Tensor]) -> None:
    with file.open("wb") as out:
        out.write(begin)
        for tensor in tensors:
            out.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
