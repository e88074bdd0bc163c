"""A package with a fault costs its own plug-ins, which say so; every other goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prunekit import Recipe, WrongInput
from prunekit.cli.main import app
from prunekit.plugins.registry import PRUNERS, BrokenPlugin, Entry, Registry
from prunekit.recipe import presets
from prunekit.system.progress import warn_once

FINE = """
from dataclasses import dataclass
from prunekit import LocalPruner
@dataclass(frozen=True)
class Fine(LocalPruner):
    '''Keep the first.'''
    share: float = 0.5
    def __post_init__(self):
        if self.share > 1:
            raise RuntimeError("a share is at most 1")
    def prune(self, layer, keeps):
        return [layer.masked(range(keep)) for keep in keeps]
class Bare(LocalPruner):
    '''No dataclass.'''
    def prune(self, layer, keeps):
        return []
@dataclass
class Stranger:
    '''Of no kind.'''
def function(): ...
"""
MODULES = {
    "fine": FINE,
    "fine_too": FINE,
    "raises": "raise RuntimeError('no licence')",
    "exits": "import sys\nsys.exit(3)",
    "incomplete": f"import not_there_at_all\n{FINE}",
    "older": f"from prunekit import NotThere\n{FINE}",
}
BROKEN = {  # name: entry point, what is said of it
    "raises": ("raises:Fine", "cannot be imported (RuntimeError: no licence)"),
    "exits": ("exits:Fine", "cannot be imported (SystemExit: 3)"),
    "older": ("older:Fine", "cannot be imported (ImportError: cannot import name 'NotThere' from 'prunekit'"),
    "gone": ("nowhere.inner:Fine", "cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
    "nameless": ("fine:Missing", "cannot be imported (AttributeError: module 'fine' has no attribute 'Missing')"),
    "malformed": ("fine Fine", "cannot be imported ("),  # ValueError where importlib-metadata is installed
    "module": ("fine", "is no dataclass that derives from LocalPruner"),
    "function": ("fine:function", "is no dataclass that derives from LocalPruner"),
    "stranger": ("fine:Stranger", "is no dataclass that derives from LocalPruner"),
    "bare": ("fine:Bare", "is no dataclass that derives from LocalPruner"),
}


def install(folder: Path, package: str, groups: dict[str, dict[str, str]]) -> None:
    """What pip leaves of a distribution."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [[f"[prunekit.{group}]", *(f"{k} = {v}" for k, v in points.items())] for group, points in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(line for each in lines for line in each))


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, text in MODULES.items():
        (tmp_path / f"{module}.py").write_text(text)
    for package, text in {"recipes_one": "", "recipes_two": "", "recipes_broken": "raise SystemExit(5)"}.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(text)
        (tmp_path / package / "contested.yaml").write_text("# Two have it\nsparsity: 0.5")
    (tmp_path / "recipes_one/alone.yaml").write_text("# Only one has it\nsparsity: 0.25")
    points = {name: value for name, (value, _) in BROKEN.items()}
    install(tmp_path, "one-package", {"pruners": points | {"contested": "fine:Fine", "same": "fine:Fine"}})
    ours = {"contested": "fine_too:Fine", "same": "fine:Fine", "fine": "fine:Fine", "incomplete": "incomplete:Fine"}
    install(tmp_path, "two-package", {"pruners": ours, "recipes": {"two": "recipes_two"}})
    install(tmp_path, "three-package", {"recipes": {"one": "recipes_one", "ruined": "recipes_broken"}})
    monkeypatch.syspath_prepend(tmp_path)
    caches = (presets._found, warn_once)
    for cache in caches:
        cache.cache_clear()
    fresh: Registry[object] = Registry("pruner", "prunekit.plugins.pruner:LocalPruner")
    monkeypatch.setitem(vars(PRUNERS), "_entries", fresh._entries)
    yield
    for cache in caches:
        cache.cache_clear()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_with_its_package_and_entry_point(name: str) -> None:
    value, what = BROKEN[name]
    done = run("check", name)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: pruner {name!r} of one-package is broken: {value} {what}")
    assert done.stderr.endswith("; repair or uninstall one-package\n")


def test_a_name_that_two_packages_claim_is_refused_with_both() -> None:
    done = run("check", "contested")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "2 pruners are called 'contested', of " in done.stderr
    assert "of one-package (fine:Fine)" in done.stderr
    assert "of two-package (fine_too:Fine)" in done.stderr
    assert PRUNERS.build("same") == PRUNERS.build("fine")  # two that mean the same


def test_every_other_goes_on_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fine", "obs", "fine"):
        assert PRUNERS.spec(PRUNERS.build(name))["name"] == name
    said = capsys.readouterr().err.splitlines()
    (clash,) = (line for line in said if "contested" in line)
    assert clash.startswith("warning: 2 pruners are called 'contested'")
    assert all(line.startswith("warning: ") for line in said)
    assert len(said) == len(set(said))


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(
        ImportError, match=r"'incomplete' of two-package needs 'not_there_at_all', .*: pip install not_"
    ):
        PRUNERS.build("incomplete")


def test_whatever_a_plugin_raises_on_its_options_is_a_sentence() -> None:
    with pytest.raises(WrongInput, match="pruner 'fine': a share is at most 1"):
        PRUNERS.build({"name": "fine", "share": 2.0})


def test_the_list_goes_on_and_marks_the_broken() -> None:
    done = run("list")
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    for name in BROKEN.keys() - {"older", "stranger", "bare"}:  # which only an import can tell
        assert re.match(rf"  {name} +\[of one-package, broken\] pruner {name!r} of one-package is", lines[name])
    assert re.match(r"  contested +\[broken\] 2 recipes are called 'contested', in recipes_", lines["contested"])
    assert re.search(r"  contested +\[of \w+-package and \w+-package, broken\] 2 pruners are called", done.stdout)
    assert re.match(
        r"  ruined +\[broken\] recipes 'ruined' are broken: recipes_broken of three-package", lines["ruined"]
    )
    assert "[of two-package] Keep the first." in lines["fine"]
    assert "[of two-package, needs not_there_at_all] Keep the first." in lines["incomplete"]
    assert lines["obs"].split()[1] != "[of"
    assert lines["alone"].endswith("Only one has it")
    assert "SystemExit: 3" in run("list", "exits").stdout


def test_json_has_the_others_and_says_what_is_broken() -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "--json", "--kind", "pruner").stdout)}
    assert "SystemExit: 3" in rows["exits"]["summary"]
    assert rows["fine"]["options"] == [{"name": "share", "type": "float", "default": 0.5}]


def test_presets_go_on_without_broken_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert Recipe.load("alone").sparsity == 0.25
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert any("2 recipes are called 'contested'" in line for line in said)
    assert any("recipes_broken of three-package cannot be read (SystemExit: 5)" in line for line in said)
    for name in ("contested", "ruined"):
        with pytest.raises(WrongInput, match=name):
            Recipe.load(name)


def test_a_broken_namesake_does_not_hide_a_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    fine = PRUNERS.build("fine")  # as exits:Fine would be called, too
    assert PRUNERS.name_of(fine) == "fine"
    assert "exits:Fine cannot be imported" in capsys.readouterr().err
    with pytest.raises(BrokenPlugin):
        PRUNERS["exits"].load()


@pytest.mark.parametrize(
    ("kind", "name", "module", "told"),
    [
        ("tracker", "mlflow", "mlflow", "'prunekit[mlflow]'"),  # of which the package is called mlflow-skinny
        ("allocator", "optuna-tpe", "optuna", "'prunekit[optuna]'"),
        ("allocator", "milp", "scipy", "'prunekit[milp]'"),  # and not another extra that has scipy too
        ("finisher", "lora", "peft", "'prunekit[lora]'"),
        ("allocator", "another", "optuna", "'prunekit[optuna]'"),
        ("allocator", "another", "not_there", "not_there"),
    ],
)
def test_what_is_missing_is_named_by_the_extra_that_has_it(kind: str, name: str, module: str, told: str) -> None:
    class Absent(EntryPoint):
        def load(self) -> None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    entry = Entry(kind, name, "prunekit", Absent(name, "prunekit_strategies.nowhere:X", "group"))
    with pytest.raises(ImportError, match=re.escape(f"which is not installed: pip install {told}")):
        entry.load()
