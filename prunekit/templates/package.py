"""A plug-in package from the templates: the method, its test, a pyproject and a README, in a new folder."""

from __future__ import annotations

import difflib
import keyword
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

from prunekit.errors import WrongInput, unknown
from prunekit.plugins.registry import ADAPTERS, KINDS, Registry

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
LONGEST = 60  # letters of a name: some file systems allow 255 in all
FOREIGN = re.compile(r"(from|import) (prunekit|torch|pytest|safetensors)")
TEMPLATES = resources.files("prunekit.templates")

COMPARED = "prunekit compare MODEL"
USES: Mapping[
    str, str
] = {  # kind -> lines of shell with which a plug-in {name} is used, in a comparison where it can be
    "pruner": f"{COMPARED} --recipes default --pruners {{name}} --sparsity 0.5 --output comparison",
    "signal": (
        "prunekit list --kind allocator  # ALLOCATOR: one that maps a signal to shares, with an option `signal`\n"
        f"{COMPARED} --recipes default --allocators ALLOCATOR --set allocator.signal={{name}} --output comparison"
    ),
    "allocator": f"{COMPARED} --recipes default --allocators {{name}} --sparsity 0.5 --output comparison",
    "learner": f"{COMPARED} --recipes default --learners {{name}} --sparsity 0.5 --output comparison",
    "width": f"{COMPARED} cells.yaml --output comparison",
    "objective": (
        "prunekit list --kind allocator  # ALLOCATOR: one that searches, for the others ask no questions\n"
        f"{COMPARED} --recipes default --allocators ALLOCATOR --objectives {{name}} --output comparison"
    ),
    "finisher": f"{COMPARED} cells.yaml --output comparison",
    "metric": f"{COMPARED} --recipes default --set metric={{name}} --sparsity 0.5 --output comparison",
    "exporter": (
        "prunekit prune MODEL --sparsity 0.5 --output half\n"
        "prunekit export half --format {name}  # beside the model; verified before it is kept"
    ),
    "engine": f"{COMPARED} --recipes default --engine {{name}} --sparsity 0.5 --output comparison",
    "tracker": "prunekit prune MODEL --sparsity 0.5 --output half --track {name}",
    "adapter": (
        "prunekit list --kind pruner  # PRUNER: one of single weights\n"
        f"{COMPARED} --pruners PRUNER --set structure=weights --sparsity 0.5 --output comparison"
    ),
}
CELLS = """# What `prunekit compare` compares: the default recipe as it is, and with the plug-in.
version: 1
recipe: default
recipes: [default]
sparsity: [0.5]
cells:
  with-{name}: {{{cell}}}
"""
IN_CELLS = {"finisher": "finishers: [{name}]", "width": "width: {name}"}  # kinds that are no axis of a grid
PYPROJECT = """[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{package}"
version = "0.1.0"
description = "{summary}"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["prunekit>={version}"]

[project.optional-dependencies]
test = ["prunekit[testing]"]

[project.entry-points."prunekit.{kind}s"]
{name} = "{module}:{cls}"

[tool.hatch.build.targets.wheel]
include = ["{module}.py"]

[tool.pytest.ini_options]
verbosity_subtests = "0" # of suites, only those that fail are shown
"""
README = """# {package}

The {kind} `{name}` for prunekit. {said}

| file | |
|---|---|
| `{module}.py` | the {kind}: class `{cls}`; its fields are its options, its docstring says what it does |
| `test_{module}.py` | what every {kind} promises, and the claim of this one |
| `pyproject.toml` | the entry point that gives it the name `{name}` |

Install it in the environment of prunekit, see it, and run its suite:

```sh
pip install -e .
prunekit list {name}
prunekit check {name}
pytest
```

Use it:

```sh
{uses}
```

Then write your own, the claim in `test_{module}.py` first: change the formula in `{module}.py`, and say it in the
docstring with its source. An installation with `-e` uses the file as it is; a comparison that has rows of other code is
made anew with `--overwrite`. The plug-in guide of prunekit describes what a {kind} sees and what it must keep.
"""


@dataclass(frozen=True)
class Package:
    """A package that was written."""

    folder: Path
    files: tuple[str, ...]
    uses: str  # lines of shell


def write_package(name: str, kind: str, folder: Path | None = None) -> Package:
    """Write a complete plug-in package.

    Args:
        name: of the plug-in, as recipes say it; of an adapter the `model_type` of its models.
        kind: of the plug-in, as the registry calls it.
        folder: a new one; None: prunekit-NAME here.

    Returns:
        What was written.

    Raises:
        WrongInput: the kind is unknown, the name is none, or taken, or the folder is there; nothing is written.
    """
    registry = _registry(kind)
    module, package = f"prunekit_{name.replace('-', '_')}", f"prunekit-{name.replace('_', '-')}"
    _check_name(registry, name, module, package)
    folder = Path(package) if folder is None else folder
    if folder.exists() or folder.is_symlink():
        raise WrongInput(f"{folder} exists; name a new folder with --output")
    if not folder.parent.is_dir():
        raise WrongInput(f"there is no folder {folder.parent} for {folder.name}; make it first")
    code, test = ((TEMPLATES / f"{kind}{end}.py").read_text("utf-8") for end in ("", "_test"))
    words = {
        "name": name,
        "kind": kind,
        "module": module,
        "package": package,
        "cls": _class_name(name, kind, code, test),
    }
    words |= {"summary": f"The {kind} {name} for prunekit.", "version": _version()}
    words |= {"said": registry.summary, "uses": USES[kind].format_map(words)}
    files = {
        "pyproject.toml": PYPROJECT.format_map(words),
        "README.md": README.format_map(words),
        f"{module}.py": _renamed(code, words),
        f"test_{module}.py": _renamed(test, words),
    }
    if (cell := IN_CELLS.get(kind)) is not None:
        files["cells.yaml"] = CELLS.format_map(words | {"cell": cell.format_map(words)})
    _write(folder, files)
    return Package(folder, tuple(files), words["uses"])


def _registry(kind: str) -> Registry[object]:
    kinds = {registry.kind: registry for registry in KINDS}
    if kind not in kinds:
        raise WrongInput(unknown("kind of plug-in", kind, kinds))
    return kinds[kind]


def _check_name(registry: Registry[object], name: str, module: str, package: str) -> None:
    if NAME.fullmatch(name) is None or len(name) > LONGEST:
        raise WrongInput(
            f"{name[: 2 * LONGEST]!r} is no name for a plug-in; use small letters, digits and single hyphens, a letter "
            f"first, {LONGEST} at most, such as my-{registry.kind}"
        )
    if name in registry:
        raise WrongInput(
            f"{registry[name].owner} has a {registry.kind} {name!r} already, and two of one name cannot be used; "
            "choose another"
        )
    if find_spec(module) is not None or _installed(package):
        raise WrongInput(f"{package} would hide the package {module} that is here already; choose another name")
    if registry is ADAPTERS:
        from transformers import CONFIG_MAPPING

        known = list(CONFIG_MAPPING.keys())

        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            guess = f"; did you mean {near[0]!r}" if near else ""
            raise WrongInput(
                f"transformers has no model_type {name!r}{guess}; an adapter is called as the model_type in the "
                "config.json of its models"
            )


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _class_name(name: str, kind: str, *texts: str) -> str:
    """The name in capitals; with the kind behind it where Python or the code has another use for it."""
    found = "".join(part.capitalize() for part in re.split("[-_]", name))
    used = {word for text in texts for word in re.findall(r"\w+", text)}
    return f"{found}{kind.capitalize()}" if found in used or keyword.iskeyword(found) else found


def _renamed(text: str, words: Mapping[str, str]) -> str:
    text = text.replace(f"prunekit.templates.{words['kind']}", words["module"])
    text = re.sub(r"\b(Test)?Template(\w*)", lambda found: f"{found[1] or ''}{words['cls']}{found[2]}", text)
    return _sorted_imports(re.sub(r"\btemplate\b", words["name"], text))


def _sorted_imports(text: str) -> str:
    """Imports as a linter asks for them where prunekit is one package among others, and the module is one's own."""
    lines = text.split("\n")
    foreign = [i for i, line in enumerate(lines) if FOREIGN.match(line)]
    own = [lines[i] for i in foreign if lines[i].startswith("from prunekit_")]
    others = sorted({lines[i] for i in foreign} - set(own), key=lambda line: (line[0] == "f", line.split()[1]))
    block = [*others, "", *own] if own else others
    return "\n".join([*lines[: foreign[0]], *block, *lines[foreign[-1] + 1 :]])


def _version() -> str:
    """The minor version that is installed: before 1.0 contracts change with it."""
    return ".".join(metadata.version("prunekit").split(".")[:2])


def _write(folder: Path, files: Mapping[str, str]) -> None:
    """Beside it first, then renamed: a reader sees all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prunekit-") as beside:
        whole = Path(beside, folder.name)
        whole.mkdir()
        for name, text in files.items():
            (whole / name).write_text(text, encoding="utf-8", newline="\n")
        try:
            whole.rename(folder)
        except OSError as error:
            raise WrongInput(f"{folder} cannot be made: {error.strerror}; choose another --output") from error
