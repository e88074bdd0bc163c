"""`prunekit list`: what there is to choose from, one line each; with a name, everything about it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from shutil import get_terminal_size
from textwrap import shorten, wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli.completion import listed, one_of, plugin_kinds
from prunekit.cli.options import Json
from prunekit.errors import WrongInput, unknown

if TYPE_CHECKING:
    from prunekit.plugins.registry import Entry, Registry

WIDTH = 100  # columns, unless the terminal is narrower
USES = {"recipe": "prunekit prune MODEL --recipe", "space": "prunekit tune MODEL --space"}
PAPER = re.compile(r"arXiv[:\s]\s*(\d{4}\.\d{4,5})")
DOCS = Path(__file__).parents[2] / "docs"  # of a checkout; a wheel has none


def list_(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Name of what to describe in full: options, papers.",
            show_default=False,
            autocompletion=one_of(listed),
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A single kind, e.g. pruner, recipe or space.",
            autocompletion=one_of(lambda: [*plugin_kinds(), *USES]),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List plug-ins, recipes and spaces, one line each; describe those called NAME in full."""
    from prunekit.plugins.registry import KINDS
    from prunekit.recipe.presets import broken_presets, presets

    files = {
        kind: presets(group) | {name: f"# [broken] {fault}" for name, fault in broken_presets(group).items()}
        for kind, group in (("recipe", "prunekit.recipes"), ("space", "prunekit.spaces"))
    }
    kinds = [*(registry.kind for registry in KINDS), *files]
    if kind is not None and kind not in kinds:
        raise WrongInput(unknown("kind", kind, kinds))
    registries = [registry for registry in KINDS if kind in (None, registry.kind)]
    files = {each: texts for each, texts in files.items() if kind in (None, each)}
    known = {each for names in (*registries, *files.values()) for each in names}
    if name is not None and name not in known:
        raise WrongInput(unknown(kind or "plug-in, recipe or space", name, known))
    entries = [entry for registry in registries for entry in registry.values() if name in (None, entry.name)]
    if as_json:
        typer.echo(json.dumps([_row_of(entry) for entry in entries], indent=2, default=str))
    elif name is None:
        typer.echo("\n".join(_overview(registries, files, max(map(len, known)))))
    else:
        pages = [_page_of(entry) for entry in entries]
        pages += [_page_of_file(each, name, texts[name]) for each, texts in files.items() if name in texts]
        typer.echo("\n\n".join("\n".join(page) for page in pages))


def _row_of(entry: Entry) -> dict[str, Any]:
    row = {"kind": entry.kind, "name": entry.name, "owner": entry.owner}
    try:
        options = [{"name": o.name, "type": o.type, "default": o.default} for o in entry.options]
        return {**row, "summary": entry.summary, "options": options}
    except Exception as error:  # what is broken or not installed hides one plug-in, not the list
        return {**row, "summary": str(error), "options": []}


# -- everything, one line each --------------------------------------------------------------------------


def _overview(
    registries: Iterable[Registry[Any]], files: Mapping[str, Mapping[str, str]], longest: int
) -> Iterator[str]:
    incomplete = False
    for registry in registries:
        yield from _heading(f"{registry.kind}s", registry.summary)
        for entry in registry.values():
            incomplete |= bool(entry.missing)
            yield _line(f"  {entry.name:{longest}}  ", _summary_of(entry))
    for kind, texts in files.items():
        yield from _heading(f"{kind}s", f"{USES[kind]} NAME")
        for name, text in sorted(texts.items()):
            yield _line(f"  {name:{longest}}  ", _comment_of(text))
    yield ""
    if incomplete:
        yield "[needs X]: X is not installed; prunekit check NAME says how to install it"
    yield "prunekit list NAME describes one: options, defaults, papers"


def _heading(kind: str, said: str) -> tuple[str, str]:
    return "", typer.style(_line(f"{kind}: ", said), bold=True)


def _line(front: str, said: str) -> str:
    """What is said, cut between words where the width ends."""
    return front + shorten(said, max(20, _width() - len(front)), placeholder=" …", break_on_hyphens=False)


def _width() -> int:
    return min(WIDTH, get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


def _summary_of(entry: Entry) -> str:
    """Its first line, behind where it comes from and what is wrong with it, as far as an import is not needed."""
    marks = [] if entry.owner == "prunekit" else [f"of {entry.owner}"]
    marks += [f"needs {package}" for package in entry.missing]
    try:
        said = entry.summary
    except (WrongInput, ImportError) as error:
        marks += ["broken"] if isinstance(error, WrongInput) else []
        said = str(error)
    return f"[{', '.join(marks)}] {said}" if marks else said


def _comment_of(text: str) -> str:
    """The comment at the head of a YAML file, on one line."""
    return " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines()))


# -- one, in full ---------------------------------------------------------------------------------------


def _page_of(entry: Entry) -> Iterator[str]:
    from prunekit.plugins.registry import type_in_words
    from prunekit.plugins.source import comments
    from prunekit.plugins.words import value_in_words

    yield typer.style(f"{entry.kind} {entry.name}", bold=True) + f", of {entry.owner}"
    try:
        doc, options, said = entry.doc, entry.options, comments(entry.load())
    except Exception as error:
        yield str(error)
        return
    yield f"\n{doc.strip()}"
    if options:
        yield ""
        rows = [(o.name, value_in_words(o.default), type_in_words(o.hint), said.get(o.name, "")) for o in options]
        yield from _aligned([("option", "default", "takes", ""), *rows])
    links = [f"https://arxiv.org/abs/{paper}" for paper in dict.fromkeys(PAPER.findall(doc))]
    if entry.owner == "prunekit":
        links += _documents(entry.name)
    if links:
        yield "\nsee " + "\n    ".join(links)


def _page_of_file(kind: str, name: str, text: str) -> Iterator[str]:
    yield typer.style(f"{kind} {name}", bold=True) + f": {USES[kind]} {name} --output DIR"
    yield f"\n{text.strip()}"


def _documents(name: str) -> Iterator[str]:
    """Pages about a plug-in, by their place in the repository; there are none beside an installed wheel."""
    if (DOCS / "systems" / f"{name}.md").is_file():
        yield f"docs/systems/{name}.md"
    if (methods := DOCS / "methods.md").is_file() and f"| `{name}`" in methods.read_text(encoding="utf-8"):
        yield "docs/methods.md"


def _aligned(rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    """A table whose last two columns share a cell, which is wrapped."""
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    before = first + min(second, 24) + 4
    for name, default, takes, said in rows:
        lines = wrap(f"{takes}{'; ' if said else ''}{said}", _width() - before)
        front = f"{name:{first}}  {default}"
        if len(front) > before - 2:
            yield front
            front = ""
        for line in lines:
            yield f"{front:{before}}{line}"
            front = ""
