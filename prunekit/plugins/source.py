"""What a plug-in says of itself in its source. Nothing is imported, so that a list of all plug-ins is quick."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path

DEPTH = 16  # imports and base classes to follow at most: sources may go in circles


@dataclass(frozen=True)
class Written:
    """What stands in the source of a class."""

    doc: str  # its docstring, or that of a base class, without indentation
    missing: tuple[str, ...]  # packages that its module imports and that are not installed


def written(place: str) -> Written | None:
    """The class at module:name, by its source; None: its source cannot be found or read."""
    module, _, name = place.partition(":")
    if (found := _find_class(module, name, DEPTH)) is None:
        return None
    home, node = found
    source = _parsed(home)
    assert source is not None
    packages = dict.fromkeys(package for package in _imported(source.body) if not _installed(package))
    return Written(_docstring(home, node, DEPTH), tuple(packages))


def _docstring(module: str, node: ast.ClassDef, depth: int) -> str:
    if (doc := ast.get_docstring(node)) is not None or depth == 0:
        return doc or ""
    for base in node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base  # Contract[T]
        found = _find_class(module, name.id, depth - 1) if isinstance(name, ast.Name) else None
        if found is not None and (doc := _docstring(*found, depth - 1)):
            return doc
    return ""


def _find_class(module: str, name: str, depth: int) -> tuple[str, ast.ClassDef] | None:
    """(module, class) where a name of a module is defined; imports are followed."""
    source = _parsed(module)
    if source is None or depth == 0:
        return None
    for node in reversed(list(_statements(source.body))):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find_class(_absolute(node, module), alias.name, depth - 1)
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Of a module, those behind `if` and `try` too, in their order."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements([*node.body, *node.orelse])


def _imported(body: list[ast.stmt]) -> Iterator[str]:
    """Packages that code cannot do without: what is tried, or imported for type checkers alone, does not count."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imported(node.orelse)
        elif not isinstance(node, ast.Try):
            yield from _imported([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


@cache
def _parsed(module: str) -> ast.Module | None:
    spec = _located(module)
    read = getattr(spec.loader, "get_source", None) if spec is not None else None
    try:
        return ast.parse(read(module) or "") if read is not None else None
    except (ImportError, OSError, SyntaxError, ValueError):
        return None


@cache
def _located(module: str) -> ModuleSpec | None:
    """Its spec, without importing the packages it is in, as `importlib.util.find_spec` would."""
    parent, _, _ = module.rpartition(".")
    try:
        if not parent:
            return find_spec(module)
        above = _located(parent)
        return PathFinder.find_spec(module, above and above.submodule_search_locations)
    except (ImportError, ValueError):
        return None


def _installed(package: str) -> bool:
    return _located(package) is not None


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if node.level == 0:
        return node.module or ""
    spec = _located(module)
    package = module if spec is not None and spec.submodule_search_locations is not None else module.rpartition(".")[0]
    return resolve_name("." * node.level + (node.module or ""), package)


def digest_of(place: str) -> str:
    """SHA-256 of the code of the top-level module or package of module:name; "": it cannot be read."""
    spec = _located(place.partition(":")[0].partition(".")[0])
    if spec is None:
        return ""
    folders = spec.submodule_search_locations
    files = [Path(spec.origin)] if spec.origin and not folders else []
    files += sorted(file for folder in folders or () for file in Path(folder).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError:
            return ""
    return digest.hexdigest() if files else ""


def comments(plugin: type) -> dict[str, str]:
    """Field -> the comment behind it, in the source of an imported class and of its bases."""
    found: dict[str, str] = {}
    for each in reversed(plugin.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(each))
            (node,) = ast.parse(source).body
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        for field in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                rest = source.splitlines()[(field.end_lineno or 1) - 1].encode()[field.end_col_offset :]
                found[field.target.id] = rest.decode().strip().removeprefix("#").strip()
    return found
