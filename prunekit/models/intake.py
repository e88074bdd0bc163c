"""What a model's files are, looked at before a library reads them: what cannot be pruned is told by its name."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunekit.errors import WrongInput
from prunekit.models.configs import parse_config
from prunekit.models.places import at_hand, here
from prunekit.models.shards import INDEX, WEIGHTS, Shards, adapter, check_stored, files_of_index, quantized

BIN = "pytorch_model.bin"
POINTER = b"version https://git-lfs.github.com/spec/"
READ = {".json", ".safetensors", ".bin", ".model", ".jinja"}  # suffixes of what libraries open
QUANTIZED = ("quantization_config", "compression_config", "quantization")  # keys of a config, the last of MLX
QUANTIZED_BESIDE = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")


def read_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a model, whose files are looked at first as far as they are on this machine.

    Raises:
        WrongInput: there is none, or the model is an adapter, quantized, or not whole.
    """
    path = at_hand(source)
    if (folder := Path(path)).is_dir():
        check_folder(folder, source)
    config = parse_config(source, path, trust_remote_code=trust_remote_code)
    check_config(vars(config), source)
    return config


def check_loaded(source: str, path: str) -> None:
    """Look at the files of a model of the hub, which are here when it has been loaded."""
    if not Path(path).is_dir() and (folder := here(path)).is_dir():
        check_folder(folder, source)


def check_folder(folder: Path, source: str) -> None:
    """Refuse what is no model of plain weights.

    Raises:
        WrongInput: an adapter, a pointer to a file that was not fetched, quantized weights, a checkpoint that is not
            whole.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in READ and file.exists() and not (file.is_file() or file.is_dir()):
            raise WrongInput(f"{file} is a pipe or a device, which may never end; put the file itself there")
        if file.is_file() and _begins(file, POINTER):
            raise WrongInput(f"{file} is a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder")
    if adapters := sorted(folder.glob("adapter_*")):
        base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
        raise adapter(source, adapters[0].name, base)
    check_config(_read(folder / "config.json"), source)
    if beside := [name for name in QUANTIZED_BESIDE if (folder / name).exists()]:
        raise quantized(source, beside[0])
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        _ = Shards.of(str(folder), source).tensors
        if not (folder / WEIGHTS).exists() and not isinstance(_read(folder / INDEX).get("metadata"), dict):
            raise WrongInput(
                f"{folder / INDEX} has no metadata, which transformers reads; add a mapping, may it be empty"
            )
    else:
        _check_bin(folder, source)


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse a model whose config says that it is quantized.

    Raises:
        WrongInput: names how.
    """
    for part in (config, _values(config.get("text_config"))):
        for key in QUANTIZED:
            if part.get(key):
                said = _values(part[key])
                bits = "bitsandbytes" if any(str(name).startswith("load_in_") for name in said) else key
                raise quantized(source, str(said.get("quant_method") or bits))


def _check_bin(folder: Path, source: str) -> None:
    index = folder / f"{BIN}.index.json"
    names = [BIN] if (folder / BIN).exists() else files_of_index(index) if index.exists() else []
    for file in (folder / name for name in names):
        if not file.exists():
            raise WrongInput(f"{source!r} has no {file.name}, which its index names; fetch the model again")
        try:
            found = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
            dtypes = {name: str(value.dtype) for name, value in found.items()}
        except Exception as error:
            raise WrongInput(f"{file} is no checkpoint that can be read; fetch it again, or save it anew") from error
        for name, dtype in dtypes.items():
            check_stored(name, dtype, source)


def _read(file: Path) -> Mapping[str, Any]:
    """A file of JSON; empty where it is none, which its parser will say."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _values(said: object) -> Mapping[str, Any]:
    """What a part of a config says, parsed or not."""
    return said if isinstance(said, Mapping) else getattr(said, "__dict__", {})


def _begins(file: Path, with_: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(with_)) == with_
    except OSError:
        return False
