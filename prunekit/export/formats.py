"""Formats by name, and the engines that run them: found in the registry, never named here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput, unknown
from prunekit.export.fresh import python_of
from prunekit.plugins.exporter import Exporter
from prunekit.plugins.registry import EXPORTERS, BrokenPlugin
from prunekit.system.files import read_json

FIND = "import sys, importlib.util as u; print(*(n for n in sys.argv[1:] if u.find_spec(n) is None))"
FILE = "exports.json"  # in a folder: what was exported into it later, with which options


def build_formats(names: Sequence[str], dtype: str | None, options: Mapping[str, Any]) -> list[Exporter]:
    """Make the exporters that a command asks for.

    Args:
        names: of formats.
        dtype: of all of them; None: as each has it.
        options: NAME.option -> value; where one format is asked for, `exporter` stands for its name.

    Returns:
        One exporter for each name, in their order.

    Raises:
        WrongInput: no such format or option, a format without dtype, or two of one place.
    """
    specs: dict[str, dict[str, Any]] = {name: {"name": name} for name in names}
    for name in specs:
        known = [field.name for field in dataclasses.fields(EXPORTERS[name].load()) if field.init]
        if dtype is not None and "dtype" not in known:
            raise WrongInput(f"format {name!r} takes no dtype; its options are {', '.join(known) or 'none'}")
        specs[name] |= {} if dtype is None else {"dtype": dtype}
    for key, value in options.items():
        name, _, option = key.removeprefix("exporters.").rpartition(".")
        name = names[0] if name == "exporter" and len(specs) == 1 else name
        if name not in specs:
            raise WrongInput(f"--set takes FORMAT.option=value for {', '.join(specs)}, not {key!r}")
        specs[name][option] = value
    exporters = [EXPORTERS.build(spec) for spec in specs.values()]
    places = [exporter.place for exporter in exporters]
    if twice := [place for place in places if places.count(place) > 1]:
        raise WrongInput(f"two formats write {twice[0] or 'the folder itself'}; export them one by one")
    return exporters


def check_installed(exporter: Exporter, what: str, *, running: bool = False) -> None:
    """Refuse an exporter whose packages are not there.

    Args:
        exporter: the plug-in.
        what: needs them, for the message.
        running: whether its files are to be run, too.

    Raises:
        WrongInput: says what pip installs.
    """
    absent, where = [module for module in exporter.modules if find_spec(module) is None], ""
    if running:
        absent += _absent_for_engine(exporter)
        where = f", here or where {exporter.engine_python} names a Python" if exporter.engine_python else ""
    if absent:
        how = exporter.install or " ".join(absent)
        raise WrongInput(f'{what} needs {", ".join(absent)}, which is not installed: pip install "{how}"{where}')


def _absent_for_engine(exporter: Exporter) -> list[str]:
    """Modules that are not where the engine is to run."""
    if not exporter.engine_python or (python := python_of(exporter.engine_python)) == sys.executable:
        return [module for module in exporter.engine_modules if find_spec(module) is None]
    command = [python, "-P", "-c", FIND, *exporter.engine_modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WrongInput(f"{exporter.engine_python} names {python}, which does not run Python")
    return done.stdout.split()


def why_not_run(exporter: Exporter) -> str | None:
    """Why the engine of an exporter cannot be asked, in a sentence; None: it can."""
    try:
        check_installed(exporter, f"engine {exporter.engine!r}", running=True)
    except WrongInput as error:
        return str(error)
    return None


def formats_in(folder: Path, specs: Sequence[Mapping[str, Any]] = (), engine: str | None = None) -> dict[str, Exporter]:
    """Find the formats that a folder holds and that an engine runs.

    Args:
        folder: of a result or of a model.
        specs: of exporters that have written there, with their options; others are looked for as they are by default.
        engine: only what this one runs; None: of each place what its first engine runs that is installed.

    Returns:
        Exporters by name, the folder's own (of place "") first; of two of one name, the second by its place.
    """
    later = read_json(folder / FILE).get("exports", []) if (folder / FILE).exists() else []
    found, places = dict[str, Exporter](), set[str]()  # places for which no further engine is looked for
    for spec in (*specs, *later, *({"name": name} for name in EXPORTERS)):
        try:
            exporter = EXPORTERS.build(spec)
        except (BrokenPlugin, ImportError, WrongInput):
            continue  # of a package that is not here; nobody asked for it by name
        if not exporter.engine or engine not in (None, exporter.engine):
            continue
        if exporter.place not in places and exporter.files(folder):
            name = str(spec["name"])
            found[name if name not in found else exporter.place] = exporter
            places |= {exporter.place} if why_not_run(exporter) is None else set()
    return dict(sorted(found.items(), key=lambda each: each[1].place != ""))


def all_engines() -> dict[str, list[str]]:
    """Names of formats by the engine that runs them."""
    found = dict[str, list[str]]()
    for name, entry in EXPORTERS.items():
        try:
            engine = entry.load().engine  # type: ignore[attr-defined]
        except (BrokenPlugin, ImportError):
            continue
        if engine:
            found.setdefault(engine, []).append(name)
    return found


def choose_formats(
    folder: Path, engines: Sequence[str] | None, specs: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Exporter]:
    """Choose what is verified: all that a folder holds and that can be run here, or all that some engines run.

    Raises:
        WrongInput: no such engine, it is not installed, or the folder holds nothing for it.
    """
    if engines is not None:
        known = all_engines()
        found = [_of_engine(folder, engine, specs, known) for engine in engines]
        return {name: exporter for formats in found for name, exporter in formats.items()}
    if not (there := formats_in(folder, specs)):
        raise WrongInput(f"{folder} holds nothing that an engine runs; export it with prunekit export")
    return there


def _of_engine(
    folder: Path, engine: str, specs: Sequence[Mapping[str, Any]], engines: Mapping[str, Sequence[str]]
) -> dict[str, Exporter]:
    """All formats in a folder that one engine runs."""
    if engine not in engines:
        raise WrongInput(unknown("engine", engine, engines))
    there = formats_in(folder, specs, engine)
    for name in engines[engine]:
        check_installed(EXPORTERS.build(name), f"engine {engine!r}", running=True)
    if not there:
        how = " or ".join(f"prunekit export {folder} --format {name}" for name in engines[engine])
        raise WrongInput(f"{folder} holds nothing that {engine} runs; make it with {how}")
    return there
