"""English prose that every CPython carries: its documentation topics and its standard library docstrings.

A calibration set that needs no download. Each document falls into train, validation or test (90 : 5 : 5)
by a hash of its own text, so a document keeps its place from one Python version to the next.
"""

import ast
import inspect
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

from prunekit.errors import WrongInput

Split = Literal["train", "validation", "test"]

# no prose of the library itself: other people's packages, tests, whole applications
SKIPPED_FOLDERS = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"]
)
SHORTEST_DOCUMENT = 60  # characters; below it are mostly one-line labels
SHORTEST_REPEAT = 40  # characters; shorter paragraphs ("For example:") may occur in many documents
PROSE_SHARE = 0.4  # of the words of a document are plain words, else it is a table, a grammar or code
SMALLEST_CORPUS = 500_000  # characters; CPython 3.11 to 3.14 carry about 1.5 million

HEADING = re.compile(r"^(?=.*\w)(.+)\n([*=\-~^\"])\2{2,}$\n?", re.MULTILINE)
BLANK_LINES = re.compile(r"\n\s*\n")
PLAIN_WORD = re.compile(r"[\"'(*]*[A-Za-z][a-z]*(?:['’-][a-z]+)*[\"').,:;?!*]*")


@cache
def text(split: Split) -> str:
    """The documents of a split, in the order of their hashes (so mixed in subject), joined by blank lines.

    Raises:
        WrongInput: no such split, or this Python comes without its library.
    """
    if split not in get_args(Split):
        raise WrongInput(f"no split {split!r} of python-docs; there are {', '.join(get_args(Split))}")
    return "\n\n".join(_documents()[split])


@cache
def _documents() -> dict[Split, list[str]]:
    found = sorted(set(_cleaned([*_topics(), *_docstrings()])), key=_digest)
    characters = sum(map(len, found))
    if characters < SMALLEST_CORPUS:
        raise WrongInput(
            f"python-docs needs at least {SMALLEST_CORPUS:,} characters of documentation; this Python "
            f"({sys.executable}) carries {characters:,}, looked up in pydoc_data and "
            f"{sysconfig.get_paths()['stdlib']}. Use a full CPython with its library as .py files, "
            "or give calibration text of your own."
        )
    splits: dict[Split, list[str]] = {split: [] for split in get_args(Split)}
    for document in found:
        splits[_split(document)].append(document)
    return splits


def _topics() -> Iterator[str]:
    """The sections of the topics `help()` shows, each under its title; long topics contain short ones."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise WrongInput(
            f"python-docs needs the standard module pydoc_data.topics; this Python ({sys.executable}) comes "
            "without it. Install the full standard library, or give calibration text of your own."
        ) from error
    for name in sorted(topics):
        preamble, *sections = HEADING.split(topics[name])
        yield preamble
        for title, body in zip(sections[::3], sections[2::3], strict=True):
            yield f"{title}\n\n{body}"


def _docstrings() -> Iterator[str]:
    """All docstrings of the standard library, by file and line; files are parsed, never imported."""
    for path in _sources(sysconfig.get_paths()["stdlib"]):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes such as "\d" are not our business
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        yield from _docstrings_below(tree)


def _sources(root: str) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    # only statements hold definitions: their expressions, most of the tree, are not walked
    for field in ("body", "orelse", "handlers", "finalbody"):
        inner = getattr(node, field, None)
        for child in inner if isinstance(inner, list) else ():
            yield from _docstrings_below(child)


def _cleaned(documents: Iterable[str]) -> Iterator[str]:
    """Prose of some length, without any paragraph that an earlier document already had."""
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in BLANK_LINES.split(inspect.cleandoc(document)):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                kept.append("\n".join(line.rstrip() for line in paragraph.splitlines()))
            if len(words) >= SHORTEST_REPEAT:
                seen.add(words)
        clean = "\n\n".join(kept)
        is_remnant = len(clean) < len(document) / 2  # most of it was a repeat
        if len(clean) >= SHORTEST_DOCUMENT and not is_remnant and _is_prose(clean):
            yield clean


def _is_prose(document: str) -> bool:
    words = document.split()
    return sum(PLAIN_WORD.fullmatch(word) is not None for word in words) >= PROSE_SHARE * len(words)


def _split(document: str) -> Split:
    share = int(_digest(document)[-8:], 16) % 20  # twentieths, from other digits than those we sort by
    return "test" if share == 0 else "validation" if share == 1 else "train"


def _digest(document: str) -> str:
    return sha256(document.encode("utf-8", "surrogatepass")).hexdigest()
