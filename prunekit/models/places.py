"""Where a model is: a folder, or the hub."""

from __future__ import annotations

import re
from pathlib import Path

from prunekit.errors import WrongInput, first_line

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
        WrongInput: it is a file, or can only be a folder and is not there.
    """
    try:
        path = Path(source).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a byte that no name has, no such user
        raise WrongInput(f"{source[:80]!r} is no folder and no hub id: {first_line(error)}") from error
    if is_file:
        raise WrongInput(f"{source!r} is a file; give the folder that it is in, or a hub id")
    if path.exists():
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise WrongInput(f"there is no model folder {source!r}; give a folder with a config.json, or a hub id")
    return source
