"""Presets: YAML files in packages that entry points name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput, first_line, unknown
from prunekit.recipe.plain import MOST_LETTERS, read_plain
from prunekit.system.progress import warn_once

PRESETS = "prunekit.recipes"  # group of entry points


def presets(group: str = PRESETS) -> dict[str, str]:
    """Find the presets that are installed.

    Args:
        group: of entry points, each of which names a package with YAML files.

    Returns:
        Name of every preset -> its YAML text.
    """
    return _found(group)[0]


def broken_presets(group: str = PRESETS) -> dict[str, str]:
    """Find what cannot be used: names that two packages claim, and entry points that lead to no files.

    Args:
        group: of entry points, as of `presets`.

    Returns:
        Name of the preset, or of the entry point -> a sentence with the packages.
    """
    return _found(group)[1]


@cache
def _found(group: str) -> tuple[dict[str, str], dict[str, str]]:
    kind, texts, faults = _kind(group), dict[str, dict[str, str]](), dict[str, str]()
    for point in sorted(metadata.entry_points(group=group), key=lambda point: point.name):
        owner = f"{point.value} of {point.dist.name}" if point.dist is not None else point.value
        try:
            files = {file.name: file.read_text("utf-8") for file in _yaml_files(point.value)}
        except (Exception, SystemExit) as error:
            what = f"cannot be read ({type(error).__name__}: {first_line(error)})"
            faults[point.name] = f"{kind}s {point.name!r} are broken: {owner} {what}; repair or uninstall it"
            continue
        for name, text in files.items():
            texts.setdefault(name.removesuffix(".yaml"), {})[owner] = text
    for name, claims in texts.items():
        if len(claims) > 1:
            faults[name] = f"{len(claims)} {kind}s are called {name!r}, in {' and in '.join(claims)}; uninstall one"
    return {name: text for name, claims in texts.items() if name not in faults for text in claims.values()}, faults


def _yaml_files(package: str) -> list[Traversable]:
    return sorted((f for f in resources.files(package).iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)


def _kind(group: str) -> str:
    return group.removeprefix("prunekit.").removesuffix("s")


# -- reading ------------------------------------------------------------------------------------------


def read_yaml(name: str | Path, group: str = PRESETS) -> dict[str, Any]:
    """Read the mapping in a preset, a file, or the folder of a result.

    Args:
        name: of any of them.
        group: of entry points, as of `presets`.

    Raises:
        WrongInput: there is none, it is broken, or it is no mapping.
    """
    known, faults, what = presets(group), broken_presets(group), _kind(group)
    if str(name) in faults:
        raise WrongInput(faults[str(name)])
    for fault in faults.values():
        warn_once(fault)
    path = Path(name).expanduser()
    path = path / "recipe.yaml" if (path / "recipe.yaml").is_file() else path
    if str(name) in known:
        text = known[str(name)]
    elif path.is_file():
        text = _text(path, f"{what} {str(name)!r}")
    elif path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise WrongInput(f"no {what} file {str(name)!r}; give a file, or one of the presets {', '.join(known)}")
    else:
        raise WrongInput(unknown(what, str(name), known))
    values = read_plain(text, f"{what} {str(name)!r}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise WrongInput(f"{what} {str(name)!r} is not a list of key: value")
    return values


def _text(path: Path, what: str) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MOST_LETTERS + 1)  # one more is refused
    except UnicodeDecodeError as error:
        raise WrongInput(f"{what} is not UTF-8: {first_line(error)}; save it as UTF-8") from None
    except OSError as error:
        raise WrongInput(f"{what} cannot be read: {error.strerror}") from None


def laid_over(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`; only the data go key by key, a plug-in is taken whole, a learner for an allocator."""
    both = base | ({"allocator": None} if top.get("learner") is not None else {}) | dict(top)
    if isinstance(base.get("data"), dict) and isinstance(top.get("data"), Mapping):
        both["data"] = base["data"] | dict(top["data"])
    return both


def beside(priced: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A price table that is named in a recipe file lies beside it."""
    prices = priced.get("prices")
    return {**priced, "prices": str(folder / prices)} if isinstance(prices, str) else dict(priced)
