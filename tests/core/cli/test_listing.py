"""`prunekit list` says what there is, on one line each, and everything about one."""

import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prunekit.cli.main import app
from prunekit.plugins import source
from prunekit.plugins.allocator import Allocator
from prunekit.plugins.registry import KINDS, PRUNERS, BrokenPlugin, Entry, type_in_words
from prunekit.plugins.words import value_in_words


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["list", *arguments])


def test_every_name_has_one_line_below_the_heading_of_its_kind() -> None:
    lines = run().stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for kind in KINDS:
        begin = next(i for i, line in enumerate(lines) if line.startswith(f"{kind.kind}s: "))
        names = [line.split()[0] for line in lines[begin + 1 : begin + 1 + len(kind)]]
        assert names == list(kind)
        assert all(len(line.split()) > 2 for line in lines[begin + 1 : begin + 1 + len(kind)])
    assert any(re.match(r"  default +Optimal brain surgeon on groups .* …$", line) for line in lines)
    assert any(re.match(r"  adapruner +AdaPruner", line) for line in lines)


def test_json_has_every_plugin_with_its_options() -> None:
    rows = json.loads(run("--json").stdout)
    assert {row["kind"] for row in rows} == {kind.kind for kind in KINDS}
    assert all(row.keys() == {"kind", "name", "owner", "summary", "options"} for row in rows)
    (obs,) = (row for row in rows if row["name"] == "obs")
    assert obs["owner"] == "prunekit"
    assert obs["summary"]
    assert {"name": "aim", "type": "Literal['own', 'dense', 'stream']", "default": "own"} in obs["options"]


def test_what_is_read_from_sources_is_what_python_says() -> None:
    import inspect

    for kind in KINDS:
        for entry in kind.values():
            if kind.kind == "tracker" and entry.missing:  # no part of what tests need
                continue
            assert entry.doc == inspect.getdoc(entry.load()), entry
            assert entry.missing == ()


def test_one_plugin_is_told_in_full() -> None:
    said = run("obs").stdout
    assert said.startswith("pruner obs, of prunekit\n")
    assert "Groups that nothing ever reaches go first." in said  # the last line of its docstring
    assert re.search(r"^refit +yes +yes/no; least-squares weights on the kept groups", said, re.MULTILINE)
    assert re.search(r"^aim +own +one of: own, dense, stream", said, re.MULTILINE)
    assert "https://arxiv.org/abs/2302.04089" in said
    assert "docs/methods.md" in said
    assert "typing." not in said
    assert "Literal" not in said


def test_a_name_of_several_kinds_is_told_for_each_unless_one_is_asked() -> None:
    said = run("tyr").stdout
    for head in (
        "pruner tyr, of prunekit",
        "allocator tyr, of prunekit",
        "recipe tyr: prunekit prune MODEL --recipe tyr",
    ):
        assert re.search(f"^{head}", said, re.MULTILINE)
    assert re.search(r"^inner +evolution +an allocator", said, re.MULTILINE)
    assert "docs/systems/tyr.md" in said
    only = run("tyr", "--kind", "recipe").stdout
    assert only.startswith("recipe tyr")
    assert "pruner tyr" not in only
    assert "space adapruner: prunekit tune MODEL --space adapruner" in run("adapruner").stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("obz",), "no plug-in, recipe or space 'obz'; did you mean 'obs'?"),
        (("obs", "--kind", "allocator"), "no allocator 'obs'"),
        (("--kind", "pruners"), "no kind 'pruners'; did you mean 'pruner'?"),
    ],
)
def test_an_unknown_name_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr


def test_the_width_is_that_of_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.cli.listing._width", lambda: 60)
    assert max(map(len, run().stdout.splitlines()[:-2])) <= 60


# -- a third party's ------------------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of somebody else, with plug-ins that must not be imported to be listed."""
    package = tmp_path / "theirs"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "inner/__init__.py").write_text(
        "from .deep import Renamed as Mine\nfrom theirs.inner.circle import Loop\n"
    )
    (package / "inner/deep.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import only_for_types\n"
        "try:\n    import nice_to_have\nexcept ImportError:\n    nice_to_have = None\n"
        "import os, not_there_a.sub\n"
        "from .base import Base\n"
        "class Renamed(Base):\n    def prune(self):\n        from not_there_b import x\n"
    )
    (package / "inner/base.py").write_text('class Base:\n    """What a base says.\n\n    And more."""\n')
    (package / "inner/circle.py").write_text("from theirs.inner import Loop\n")
    (package / "inner/broken.py").write_text("class Broken(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    source._located.cache_clear()
    source._parsed.cache_clear()
    return package


def entry(value: str, name: str = "mine") -> Entry:
    return Entry("pruner", name, "their-package", EntryPoint(name, value, "prunekit.pruners"))


def test_a_source_is_followed_through_imports_and_bases_and_not_run(theirs: Path) -> None:
    mine = entry("theirs.inner:Mine")
    assert (mine.summary, mine.doc) == ("What a base says.", "What a base says.\n\nAnd more.")
    assert mine.missing == ("not_there_a", "not_there_b")


@pytest.mark.parametrize("value", ["theirs.inner:Loop", "theirs.inner.broken:Broken", "theirs.gone:Gone", "nowhere:X"])
def test_what_cannot_be_read_is_imported(theirs: Path, value: str) -> None:
    assert entry(value).missing == ()
    with pytest.raises(BrokenPlugin, match=f"of their-package is broken: {value} cannot be imported"):
        _ = entry(value).summary


def test_owner_and_missing_packages_are_marked(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strangers = {"mine": entry("theirs.inner:Mine"), "nowhere": entry("nowhere:X", "nowhere")}
    for kind in KINDS:
        monkeypatch.setitem(vars(kind), "_entries", strangers if kind is PRUNERS else {})
    said = run("--kind", "pruner").stdout
    assert re.search(r"  mine +\[of their-package, needs not_there_a, needs not_there_b\] What a base says\.", said)
    assert re.search(
        r"  nowhere +\[of their-package, broken\] pruner 'nowhere' of their-package is broken: nowhere:X", said
    )
    assert "[needs X]: X is not installed" in said
    assert "of their-package" in run("nowhere").stdout
    rows = json.loads(run("--json").stdout)
    assert [row["options"] for row in rows] == [[], []]


def test_types_and_values_are_said_in_words() -> None:
    from collections.abc import Mapping, Sequence
    from typing import Any, Literal

    said = {
        int: "whole number", float: "number", bool: "yes/no", str: "text", Any: "anything", Path: "Path",
        int | None: "whole number, or none", int | str: "whole number or text",
        Literal["a", 2] | None: "one of: a, 2, or none",
        tuple[int, ...]: "a list, each whole number", Sequence[Literal["a"]]: "a list, each one of: a",
        tuple[int, float]: "2 values: whole number, number",
        dict[str, int]: "a mapping", Mapping[str, Any]: "a mapping",
        Allocator: "an allocator", PRUNERS.contract | None: "a pruner, or none", list: "list",
    }  # fmt: skip
    assert {hint: type_in_words(hint) for hint in said} == said
    values = [True, None, (), (1, (2, False)), {"name": "obs", "aim": "own"}, 0.5, "x"]
    assert list(map(value_in_words, values)) == ["yes", "none", "none", "1, 2, no", "obs", "0.5", "x"]
