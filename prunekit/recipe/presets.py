"""Presets: YAML files in packages that entry points name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import yaml

from prunekit.errors import WrongInput, unknown

PRESETS = "prunekit.recipes"  # group of entry points


@cache
def presets(group: str = PRESETS) -> dict[str, str]:
    """Find the presets that are installed.

    Args:
        group: of entry points, each of which names a package with YAML files.

    Returns:
        Name of every preset -> its YAML text.

    Raises:
        WrongInput: two of them have one name.
    """
    found: dict[str, str] = {}
    for point in sorted(metadata.entry_points(group=group), key=lambda point: point.name):
        for file in sorted(resources.files(point.value).iterdir(), key=lambda file: file.name):
            name, _, suffix = file.name.rpartition(".")
            if suffix != "yaml":
                continue
            if name in found:
                raise WrongInput(f"two presets are called {name!r}, one of them in {point.value}; uninstall one")
            found[name] = file.read_text(encoding="utf-8")
    return found


# -- reading ------------------------------------------------------------------------------------------


def read_yaml(name: str | Path, known: Mapping[str, str], what: str) -> dict[str, Any]:
    """Read the mapping in a preset, a file, or the folder of a result.

    Args:
        name: of any of them.
        known: text of the presets by name.
        what: it is, for sentences.

    Raises:
        WrongInput: there is none, or it is no mapping.
    """
    path = Path(name).expanduser()
    path = path / "recipe.yaml" if (path / "recipe.yaml").is_file() else path
    if str(name) in known:
        text = known[str(name)]
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise WrongInput(f"no {what} file {str(name)!r}; give a file, or one of the presets {', '.join(known)}")
    else:
        raise WrongInput(unknown(what, str(name), known))
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise WrongInput(f"{what} {str(name)!r}{where} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise WrongInput(f"{what} {str(name)!r} is not a list of key: value")
    return values


def laid_over(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`; only the data go key by key, a plug-in is taken whole."""
    both = base | dict(top)
    if isinstance(base.get("data"), dict) and isinstance(top.get("data"), Mapping):
        both["data"] = base["data"] | dict(top["data"])
    return both


def beside(priced: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A price table that is named in a recipe file lies beside it."""
    prices = priced.get("prices")
    return {**priced, "prices": str(folder / prices)} if isinstance(prices, str) else dict(priced)
