"""Where a model is: a folder, or the hub."""

from __future__ import annotations

from pathlib import Path

from prunekit.errors import WrongInput


def located(source: str) -> str:
    """The folder a model is in, or its hub id.

    Raises:
        WrongInput: it is a file, or can only be a folder and is not there.
    """
    path = Path(source).expanduser()
    if path.is_file():
        raise WrongInput(f"{source!r} is a file; give the folder that it is in, or a hub id")
    if path.exists():
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise WrongInput(f"there is no model folder {source!r}; give a folder with a config.json, or a hub id")
    return source
