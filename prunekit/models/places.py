"""Where a model is: a folder, or the hub."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from prunekit.errors import WrongInput, one_line
from prunekit.system.files import check_name, read_json
from prunekit.system.progress import warn_once

SECONDS = 10  # to wait for the hub
OF_LIBRARIES = ("tokenizer*.json", "special_tokens_map.json", "generation_config.json")  # what only they read
PIPELINE = "model_index.json"  # of several models
DEVICE = re.compile(r"auto|(cpu|cuda)(:\d{1,3})?")


def check_device(device: str) -> None:
    """Refuse what is not the name of a device, whether or not this machine has it.

    Raises:
        WrongInput: the names that there are.
    """
    if DEVICE.fullmatch(device) is None:
        raise WrongInput(f"no device {device!r}; there are auto, cpu, cuda, cuda:N")


def located(source: str) -> str:
    """The folder a model is in, or its hub id.

    Raises:
        WrongInput: it is a file, can only be a folder and is not there, or holds no language model.
    """
    check_name(source)
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a byte that no name has, no such user
        raise WrongInput(f"{source[:80]!r} is no folder and no hub id: {one_line(error)}") from error
    if is_file:
        raise WrongInput(f"{source!r} is a file; give the folder that it is in, or a hub id")
    if (path / PIPELINE).is_file() and not (path / "config.json").exists():
        raise WrongInput(
            f"{source!r} is a pipeline of diffusers and no language model; its U-Net is pruned with python -m "
            f"prunekit_strategies.diffusion {source} --sparsity SHARE --output DIR"
        )
    if path.exists():
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise WrongInput(f"there is no model folder {source!r}; give a folder with a config.json, or a hub id")
    return source


def cannot_open(source: str, error: BaseException, what: str = "is not a model that can be opened") -> WrongInput:
    """What another library said of a model, in one sentence with its advice."""
    if "trust_remote_code" in str(error):
        return WrongInput(
            f"{source!r} comes with code of its own, which runs only where the caller allows it, with "
            "--trust-remote-code or trust_remote_code=True"
        )
    for file in sorted(file for name in OF_LIBRARIES for file in Path(source).expanduser().glob(name)):
        try:
            read_json(file)
        except WrongInput as broken:
            error = broken
            break
    return WrongInput(f"{source!r} {what}: {one_line(error)}")


def at_hand(source: str) -> str:
    """As `located`; where the hub does not answer, the folder in which its cache holds the model.

    Each file would be asked for several times, for minutes, before the cache is looked at.

    Raises:
        WrongInput: as `located`, or the hub does not answer and the cache does not hold it.
    """
    path = located(source)
    return path if Path(path).is_dir() else _reached(path)


def here(path: str) -> Path:
    """The folder of a model that is on this machine, of a hub id the one in its cache; no folder where it is not."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(path).expanduser()
    held = None if folder.is_dir() else try_to_load_from_cache(path, "config.json")
    return Path(held).parent if isinstance(held, str) else folder


@cache
def _reached(name: str) -> str:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return name
    try:
        HfApi().model_info(name, timeout=SECONDS)
    except HFValidationError as error:
        raise WrongInput(f"{name!r} is neither a folder nor a hub id: {one_line(error)}") from error
    except Exception as error:
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and response is not None and response.status_code < 500:
            return name  # it answers; what it says is told where the model is opened
        held = try_to_load_from_cache(name, "config.json")
        if not isinstance(held, str):
            raise WrongInput(
                f"{name!r} is no folder here, and the hub does not answer ({one_line(error)}); give a folder, or see "
                "to the network"
            ) from error
        folder = Path(held).parent
        warn_once(f"the hub does not answer; {name} is taken from its cache, revision {folder.name}")
        return str(folder)
    return name
